"""The same bits as the in-process engine, over a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fedhelp import assert_same, config, make_keys, outcome, with_keys
from flowhelp import loopback, serve

from fedkl.federation import run
from fedkl.flower import FlowerConfig

SHORT = {"length": 64}
RUNS: dict[str, Any] = {
    "channel": config("channel", defense_settings=SHORT, model={"name": "lenet"}),
    "fedbn": config("fedbn"),
    "none": config("none"),
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
    two = serve(loopback(wanted, flower), wanted, flower)
    assert_same(one.shared, two.shared)
    assert outcome(here) == outcome(there)
