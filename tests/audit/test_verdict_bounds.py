"""Verdicts at the bounds themselves."""

from __future__ import annotations

from typing import Any

import pytest

from fedkl.audit.verdicts import judge, works


def at(advantage: float, identified: float, *, low: bool) -> dict[str, Any]:
    """An entry of 20 victims whose lower or upper bounds are these, and all others harmless."""
    bounds = {"advantage": advantage, "identified": identified}
    none = {name: {"mean": 0.0, "low": -1.0} for name in bounds}
    return {
        "n": 20,
        "works": dict.fromkeys(bounds, True),
        **({name: {"mean": 0.5, "low": value} for name, value in bounds.items()} if low else none),
        "ceiling": dict.fromkeys(bounds, 0.0) if low else bounds,
    }


@pytest.mark.parametrize(
    "entry, verdict",
    [
        (at(0.05, 0.02, low=True), "holds"),  # to leak takes more than these
        (at(0.0501, 0.02, low=True), "leaks"),
        (at(0.05, 0.0201, low=True), "leaks"),
        (at(0.02, 0.02, low=False), "holds"),  # at most these
        (at(0.0201, 0.02, low=False), "inconclusive"),
        (at(0.02, 0.0201, low=False), "inconclusive"),
    ],
)
def test_bounds_themselves_belong_to_the_milder_verdict(
    entry: dict[str, Any], verdict: str
) -> None:
    assert judge(entry)[0] == verdict


@pytest.mark.parametrize("found, enough", [(0.1, True), (0.0999, False)])
def test_an_attack_works_from_a_tenth_on(found: float, enough: bool) -> None:
    place = dict.fromkeys(("attack", "stage", "batch", "steps", "observations", "aggregated"), 1)
    figures = {name: {"mean": 1.0, "low": found} for name in ("advantage", "identified")}
    floor = {"floor_identified": {"mean": 0.0}}
    control = {**place, **figures, **floor, "defense": "pad", "threat": "key-shared"}
    entry = {**control, "threat": "adaptive"}
    assert works(entry, [control, entry]) == {"advantage": enough, "identified": enough}
