"""A run measured again after a round of before."""

from __future__ import annotations

from pathlib import Path

import pytest
from fedhelp import config

from fedkl.errors import CheckpointError
from fedkl.federation import RunConfig, run
from fedkl.federation.checkpoint import Checkpoints
from fedkl.federation.reevaluate import reevaluate


def with_best_of_round_1(wanted: RunConfig, folder: Path) -> float:
    """A run whose best round is its first; the accuracy it had then."""
    result = run(wanted, folder)
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save_best(checkpoints.load(1))
    return float(result.validation[0]["accuracy"]["own_key"])


@pytest.mark.parametrize("defense", ["fedbn", "channel"])
def test_clients_that_had_not_taken_part_yet_have_lost_nothing(
    defense: str, tmp_path: Path
) -> None:
    few = {"clients": 6, "fraction": 0.34, "rounds": 2, "join_steps": 2}
    all_six = {"every": 1, "clients": 6, "wrong_keys": 1, "images": 50}
    wanted = config(defense, federation=few, evaluation=all_six)
    own_key = with_best_of_round_1(wanted, tmp_path)
    firsts = {sorted(client.iterdir())[0].stem for client in (tmp_path / "clients").iterdir()}
    assert firsts == {"round-000001", "round-000002"}
    found = reevaluate(tmp_path, split="validation", checkpoint="best")
    assert found.round == 1
    assert found.accuracy.own_key == own_key


def test_a_lock_that_is_gone_is_missed(tmp_path: Path) -> None:
    with_best_of_round_1(config("fedbn"), tmp_path)
    (tmp_path / "clients" / "00001" / "round-000001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="client 1 had after round 1 is no longer kept"):
        reevaluate(tmp_path, split="validation", checkpoint="best")
