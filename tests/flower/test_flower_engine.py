"""The same bits as the in-process engine, over a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fedhelp import assert_same, config, make_keys, outcome, with_keys
from flowhelp import loopback, serve

from fedkl.federation import Update, aggregate, run
from fedkl.files import read_tensors
from fedkl.flower import FlowerConfig

SHORT = {"length": 64}
RUNS: dict[str, Any] = {
    "channel": config("channel", defense_settings=SHORT, model={"name": "lenet"}),
    "fedbn": config("fedbn"),
    "none": config("none"),
    "prune": config("norm+prune", defense_settings={"prune_ratio": 0.8}),
    "fedsgd": config(
        "channel",
        defense_settings=SHORT,
        training={"keep_momentum": True, "batch_size": 32},
        federation={"method": "fedsgd"},
    ),
    "sampled": config(
        "channel",
        defense_settings=SHORT,
        federation={"clients": 5, "fraction": 0.6, "dropout": 0.2, "rounds": 3},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_bit_identical_with_the_engine(name: str, tmp_path: Path) -> None:
    wanted = RUNS[name]
    keys = make_keys(tmp_path / "keys", 5, 64)
    here = with_keys(tmp_path / "here", keys)
    there = with_keys(tmp_path / "there", keys)
    one = run(wanted, here)
    flower = FlowerConfig(folder=str(there))
    grid = loopback(wanted, flower)
    two = serve(grid, wanted, flower)
    assert_same(one.shared, two.shared)
    mine, theirs = outcome(here), outcome(there)
    # But for the loss, which tells the size of a gradient: no client sends its own.
    assert all(line.pop("loss") is not None for line in mine["metrics"])
    assert all(line.pop("loss") is None for line in theirs["metrics"])
    assert mine == theirs
    said = {
        name for reply in grid.received for name in reply.content.metric_records.get("metrics", {})
    }
    assert "num-examples" in said
    assert "loss" not in said


@pytest.mark.parametrize("defense", ["pad", "pad+prune"])
def test_pads_are_the_same_and_stay_with_their_clients(defense: str, tmp_path: Path) -> None:
    """Random keys this time; the server does not hear how much of a pad is used up."""
    wanted = config(defense, model={"name": "lenet"}, data={"samples": 100})
    one = run(wanted, tmp_path / "here")
    there = with_keys(tmp_path / "there", tmp_path / "here" / "keys")
    flower = FlowerConfig(folder=str(there))
    grid = loopback(wanted, flower)
    two = serve(grid, wanted, flower)
    assert_same(one.shared, two.shared)
    for client in range(3):
        name = f"clients/{client:05d}/round-000002.safetensors"
        mine, meta = read_tensors(tmp_path / "here" / name)
        theirs = read_tensors(there / name)
        assert_same(mine, theirs[0])
        assert meta == theirs[1]
    said = {name for reply in grid.received for name in reply.content.config_records["config"]}
    assert said == {"protocol", "client", "examples", "group", "kind"}


def test_saved_updates_are_what_the_round_was_made_of(tmp_path: Path) -> None:
    """Their aggregate is the next round's global state, bit for bit."""
    wanted = RUNS["channel"]
    flower = FlowerConfig(folder=str(tmp_path), save_updates=True)
    result = serve(loopback(wanted, flower), wanted, flower)
    assert sorted(p.name for p in (tmp_path / "updates").iterdir()) == [
        "round-000001",
        "round-000002",
    ]
    states = []
    for round_ in (1, 2):
        folder = tmp_path / "updates" / f"round-{round_:06d}"
        start, about = read_tensors(folder / "global.safetensors")
        assert about == {"round": str(round_)}
        updates = []
        for client in range(3):
            tensors, facts = read_tensors(folder / f"client-{client:05d}.safetensors")
            assert facts["client"] == str(client)
            assert facts["kind"] == "state"
            updates.append(Update(client, round_, "state", tensors, int(facts["examples"])))
        states += [start, aggregate(updates)]
    assert_same(states[1], states[2])
    assert_same(states[3], result.shared)
