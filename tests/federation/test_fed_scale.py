"""Few and many clients, all and some of them a round, even and uneven parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fedhelp import config, digits, make_keys, with_keys

from fedkl.federation import run
from fedkl.federation.jobs import Job
from fedkl.federation.session import Session

LOCK = {"length": 16}


@pytest.mark.parametrize("clients, fraction", [(3, 1.0), (10, 0.5), (100, 0.05)])
def test_own_key_at_any_number_of_clients(clients: int, fraction: float, tmp_path: Path) -> None:
    wanted = config(
        "channel",
        defense_settings=LOCK,
        federation={"clients": clients, "fraction": fraction, "rounds": 4, "join_steps": 3},
    )
    folder = with_keys(tmp_path / "run", make_keys(tmp_path / "keys", clients, 16))
    result = run(wanted, folder, bundle=digits())
    accuracy = result.accuracy
    assert len(accuracy.own_per_client) == 3
    assert accuracy.wrong_key is not None
    assert accuracy.own_key > accuracy.wrong_key
    assert [line["clients"] for line in result.validation] == [wanted.federation.sampled] * 4


def test_files_of_many_clients_do_not_pile_up(tmp_path: Path) -> None:
    """At most what the two checkpoints, the best round and the last one need."""
    federation = {"clients": 12, "fraction": 0.5, "rounds": 14, "join_steps": 0}
    wanted = config(
        "fedbn", federation=federation, evaluation={"every": 5, "images": 20, "thief_images": 20}
    )
    run(wanted, tmp_path, bundle=digits())
    counts = [len(list(place.iterdir())) for place in (tmp_path / "clients").iterdir()]
    assert 6 <= len(counts) <= 12
    assert max(counts) <= 4
    assert not (tmp_path / "keys").exists()


def test_the_states_of_the_best_round_are_kept(tmp_path: Path) -> None:
    """Whatever happens later, the best model can still be used with its locks."""
    wanted = config("fedbn", federation={"rounds": 6}, evaluation={"every": 0})
    session = Session(wanted, tmp_path, digits())
    shared = session.initial()
    for number in range(1, 7):
        keep = [number - 2, number - 1, 2 if number > 2 else 0]
        session.run(Job("train", 0, number, keep=keep), shared)
    assert session.store.rounds(0) == [2, 4, 5, 6]
    assert session.store.load(0, before=3).round == 2


@pytest.mark.parametrize(
    "data", [{"partition": "shards"}, {"partition": "dirichlet", "alpha": 0.5}, {"samples": 40}]
)
def test_uneven_parts(data: dict[str, object], tmp_path: Path) -> None:
    wanted = config("fedbn", data=data, federation={"clients": 6})
    session = Session(wanted, tmp_path / "look", digits())
    sizes = [len(part) for part in session.parts]
    assert sum(sizes) == (240 if "samples" in data else len(digits().train))
    assert len(torch.cat(session.parts).unique()) == sum(sizes)
    assert (len(set(sizes)) > 1) == (data.get("partition") == "dirichlet")
    result = run(wanted, tmp_path / "run", bundle=digits())
    assert result.counts == {"refused": 0, "dropped": 0}


def test_fresh_clients_make_no_evaluation_fail(tmp_path: Path) -> None:
    """One client in ten trains a round: the examined ones may know no other lock yet."""
    wanted = config(
        "channel",
        defense_settings=LOCK,
        federation={"clients": 10, "fraction": 0.1, "rounds": 2, "join_steps": 1},
    )
    result = run(wanted, tmp_path, bundle=digits())
    assert result.accuracy.other_client is not None
    assert "others_mean" in result.accuracy.thief
