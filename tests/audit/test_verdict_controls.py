"""Which control vouches for an attack, and what intervals and labels count."""

from __future__ import annotations

from typing import Any

import pytest
from verdicthelp import WORKING, rows

from fedkl.audit.verdicts import summarize
from fedkl.metrics import mean_interval


@pytest.mark.parametrize(
    "defense, control, threat, verdict",
    [
        ("noise", "none", "open", "holds"),  # the same network
        ("norm+noise", "none", "open", "inconclusive"),  # another one, where that has no norm
        ("norm+noise", "norm", "open", "holds"),
        ("pad", "norm", "open", "holds"),  # where no key holder could be attacked
        ("pad", "fedbn", "key-shared", "inconclusive"),
        ("pad+noise", "pad+noise", "key-shared", "holds"),
        ("pad+noise", "none", "open", "inconclusive"),
    ],
)
def test_control_is_the_key_holder_or_the_same_network_in_the_open(
    defense: str, control: str, threat: str, verdict: str
) -> None:
    found = [*rows(control, threat, 200, 0.3, 150), *rows(defense, "adaptive", 200, -0.1)]
    entries = summarize(found, judged=[defense])
    assert next(e for e in entries if e["role"] == "defense")["verdict"] == verdict
    if "pad" in defense and threat == "open":  # a key holder who fails outweighs it
        entries = summarize([*found, *rows(defense, "key-shared", 200, 0.0)], judged=[defense])
        mine = next(e for e in entries if e["role"] == "defense")
        assert mine["verdict"] == "inconclusive"


def test_control_that_succeeds_by_luck_is_none() -> None:
    """5 of 20 identified and 0.11 of advantage, give or take 0.05: above a tenth, not surely."""
    lucky = rows("pad", "key-shared", 20, 0.11, 5, noise=0.1)
    found = summarize([*lucky, *rows("pad", "adaptive", 200, -0.1)], judged=["pad"])
    entry = next(e for e in found if e["role"] == "defense")
    assert entry["works"] == {"advantage": False, "identified": False}
    assert entry["verdict"] == "inconclusive"
    # An ordinary good control of 20 victims is enough.
    good = rows("pad", "key-shared", 20, 0.25, 8, noise=0.2)
    found = summarize([*good, *rows("pad", "adaptive", 200, -0.1)], judged=["pad"])
    assert next(e for e in found if e["role"] == "defense")["verdict"] == "holds"


def test_federations_that_differ_widen_the_interval() -> None:
    """All victims of one hang together: thirty of each of three tell no more than three do."""
    shares = (0.9, 0.3, 0.0)
    found = [
        {**row, "seed": seed}
        for seed, share in enumerate(shares)
        for row in rows("pad", "adaptive", 30, share, int(30 * share))
    ]
    (entry,) = summarize(found, judged=["pad"])
    mean, half = mean_interval(shares)
    assert half is not None
    for name in ("advantage", "identified"):
        assert entry[name]["mean"] == pytest.approx(mean)
    assert entry["advantage"]["low"] == pytest.approx(mean - half, abs=1e-3)
    assert entry["advantage"]["high"] == pytest.approx(mean + half, abs=1e-3)
    assert (entry["identified"]["low"], entry["identified"]["high"]) == (0, 1)
    assert entry["verdict"] == "inconclusive"
    # Where they agree the interval is that over victims.
    alike = [{**row, "seed": s} for s in range(3) for row in rows("pad", "adaptive", 30, 0.1, 9)]
    (many,), (one,) = (summarize(r, judged=["pad"]) for r in (alike, alike[:30]))
    assert many["identified"] == pytest.approx(one["identified"])


def test_labels_of_an_update_are_right_whatever_images_they_went_to() -> None:
    """Images that are noise are put in any order; all labels were found."""

    def update(label: list[int], found: list[int | None], **own: Any) -> list[dict[str, Any]]:
        (row,) = rows("none", "open", 1, 0.0)
        pairs = zip(label, found, strict=True)
        return [{**row, **own, "label": a, "label_found": b} for a, b in pairs]

    def right(*parts: list[dict[str, Any]]) -> float:
        (entry,) = summarize([row for part in parts for row in part], judged=["none"])
        return float(entry["labels_right"]["mean"])

    assert right(update([0, 1, 2, 2], [2, 2, 1, 0])) == 1
    assert right(update([0, 1, 2, 2], [2, 2, 2, 0])) == 0.75
    assert right(update([0, 1], [None, None])) == 0
    # Neither another seed's nor another update's labels count.
    assert right(update([0, 1], [0, 0], seed=0), update([0, 1], [1, 1], seed=1)) == 0.5
    assert right(update([0, 1, 2, 3], [1, 0, 2, 2], observations=2)) == 0.75
    assert right(update([0, 1, 2, 3], [2, 3, 0, 1], observations=2)) == 0


def test_crafted_control_does_not_vouch_for_an_honest_servers_attack() -> None:
    crafted = rows("norm", "crafting", 200, 0.3, 150)
    entries = summarize([*crafted, *rows("pad", "adaptive", 200, -0.1)], judged=["pad"])
    entry = next(e for e in entries if e["role"] == "defense")
    assert entry["works"] == {"advantage": False, "identified": False}
    entries = summarize([*WORKING, *rows("pad", "crafting", 200, -0.1)], judged=["pad"])
    assert next(e for e in entries if e["role"] == "defense")["verdict"] == "inconclusive"
    entries = summarize([*crafted, *rows("pad", "crafting", 200, -0.1)], judged=["pad"])
    assert next(e for e in entries if e["role"] == "defense")["verdict"] == "holds"


def test_honest_key_holder_does_not_vouch_for_a_crafting_servers_attack() -> None:
    found = [*WORKING, *rows("channel", "crafting", 200, -0.1)]
    entries = summarize(found, judged=["channel"])
    entry = next(e for e in entries if e["role"] == "defense")
    assert entry["works"] == {"advantage": False, "identified": False}
    assert entry["verdict"] == "inconclusive"


def test_control_in_another_metric_does_not_count() -> None:
    """An attack that finds identities but no likeness cannot show that likeness is hidden."""
    controls = rows("channel", "key-shared", 200, 0.0, 150)
    entries = summarize([*controls, *rows("channel", "adaptive", 200, -0.1)], judged=["channel"])
    entry = next(e for e in entries if e["role"] == "defense")
    assert entry["works"] == {"advantage": False, "identified": True}
    assert entry["verdict"] == "inconclusive"
