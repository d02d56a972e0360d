"""Verdicts: every branch of the rule, and that it never says more than the data."""

from __future__ import annotations

from typing import Any

import pytest
from verdicthelp import ELSEWHERE, IDLE, WORKING, rows

from fedkl.audit.verdicts import EXIT_CODES, overall, summarize
from fedkl.metrics import mean_interval


@pytest.mark.parametrize(
    "mine, controls, verdict, reason",
    [
        (rows("channel", "adaptive", 50, 0.2), WORKING, "leaks", "beats the floor by 0.200"),
        (rows("channel", "adaptive", 50, 0.2), IDLE, "leaks", "beats the floor"),
        (rows("channel", "adaptive", 200, -0.1, 40), WORKING, "leaks", "identified"),
        (rows("channel", "adaptive", 200, -0.1, 0), WORKING, "holds", "succeeds where it should"),
        (rows("channel", "adaptive", 200, -0.1, 0), IDLE, "inconclusive", "says nothing"),
        # It gets through another network, and not through this one with the key.
        (rows("channel", "adaptive", 200, -0.1, 0), [*IDLE, *ELSEWHERE], "inconclusive", "nothing"),
        (rows("channel", "adaptive", 200, -0.1, 0), ELSEWHERE, "inconclusive", "says nothing"),
        (rows("channel", "adaptive", 200, -0.1, 0), [], "inconclusive", "says nothing"),
        # Only what is too wide is named.
        (rows("channel", "adaptive", 20, -0.1, 0), WORKING, "inconclusive", "room for identific"),
        (rows("channel", "adaptive", 200, 0.03, 0), WORKING, "inconclusive", "up to 0.03"),
        (rows("channel", "adaptive", 200, 0.0, 6, 0.01), WORKING, "inconclusive", "6."),
        (rows("channel", "adaptive", 1, -0.1), WORKING, "inconclusive", "there are 1:"),
        (rows("channel", "adaptive", 1, -0.1, 1), WORKING, "inconclusive", "takes 5 victims"),
        (rows("channel", "adaptive", 4, 0.2, 4), WORKING, "inconclusive", "takes 5 victims"),
        (rows("channel", "adaptive", 5, 0.2, 5), WORKING, "leaks", "beats the floor by 0.200"),
    ],
)
def test_rule(
    mine: list[dict[str, Any]], controls: list[dict[str, Any]], verdict: str, reason: str
) -> None:
    entries = summarize([*mine, *controls], judged=["channel"])
    entry = next(e for e in entries if e["role"] == "defense")
    assert entry["verdict"] == verdict
    assert reason in entry["reason"]
    assert overall(entries, ["channel"])["overall"] == verdict


@pytest.mark.parametrize("victims, verdict", [(99, "inconclusive"), (100, "holds")])
def test_the_wide_bound_is_for_a_hundred_victims_or_more(victims: int, verdict: str) -> None:
    found = [*WORKING, *rows("channel", "adaptive", victims, -0.1, 0)]  # up to 3.7 %
    assert overall(summarize(found, judged=["channel"]), ["channel"])["overall"] == verdict


def test_a_victim_left_out_counts_as_given_away_in_advantage_too() -> None:
    mine = rows("channel", "adaptive", 300, 0.015)
    found = summarize([*WORKING, *mine], judged=["channel"])
    assert overall(found, ["channel"])["overall"] == "holds"
    mine[0] |= {"left_out": "its gradient is zero", "advantage": 0.0}
    entries = summarize([*WORKING, *mine], judged=["channel"])
    entry = next(e for e in entries if e["role"] == "defense")
    values = [0.6, *(row["advantage"] for row in mine[1:])]  # 1 less the floor's aligned SSIM
    mean, half = mean_interval(values)
    assert entry["ceiling"]["advantage"] == pytest.approx(mean + half)
    assert mean + half > 0.02
    assert entry["ceiling"]["identified"] < 0.02
    assert entry["verdict"] == "inconclusive"


def test_cheap_attacks_need_the_narrow_bound() -> None:
    found = [*WORKING, *rows("channel", "adaptive", 200, -0.1, 0)]
    assert overall(summarize(found, judged=["channel"]), ["channel"])["overall"] == "holds"
    entries = summarize(found, judged=["channel"], feed_forward=["a"])
    assert overall(entries, ["channel"])["overall"] == "holds"  # 0 of 200: below 2 %
    few = [*WORKING, *rows("channel", "adaptive", 120, -0.1, 0)]  # 0 of 120: up to 3 %
    assert overall(summarize(few, judged=["channel"]), ["channel"])["overall"] == "holds"
    entries = summarize(few, judged=["channel"], feed_forward=["a"])
    assert overall(entries, ["channel"])["overall"] == "inconclusive"


@pytest.mark.parametrize(
    "mine, controls, verdict, reason",
    [
        (rows("pad", "adaptive", 200, -0.1), rows("pad", "key-shared", 200, -0.1, 100), "holds",
         "identification at most 1.8% (95 %), while"),
        (rows("pad", "adaptive", 200, -0.1), rows("pad", "key-shared", 200, 0.3, 0), "inconclusive",
         "floor by 0.1 in identification"),
        (rows("pad", "adaptive", 200, -0.1, 4), WORKING, "inconclusive", "leave room for identif"),
        (rows("pad", "adaptive", 200, -0.1, 40), WORKING, "leaks", "20% of the images"),
        (rows("pad", "adaptive", 200, 0.2, 0), WORKING, "leaks", "beats the floor by 0.200"),
    ],
)  # fmt: skip
def test_who_draws_nothing_is_judged_by_what_is_recognized(
    mine: list[dict[str, Any]], controls: list[dict[str, Any]], verdict: str, reason: str
) -> None:
    found = [*mine, *controls]
    entries = summarize(found, judged=["pad"], feed_forward=["a"], recognizing=["a"])
    entry = next(e for e in entries if e["role"] == "defense")
    assert (entry["verdict"], reason in entry["reason"]) == (verdict, True)
    drawing = summarize(found, judged=["pad"], feed_forward=["a"])
    assert next(e for e in drawing if e["role"] == "defense")["verdict"] in (
        verdict,
        "inconclusive",
    )


def test_worst_attack_is_the_one_that_finds_most_in_either_figure() -> None:
    def by(attack: str, advantage: float, hits: int) -> list[dict[str, Any]]:
        return [{**r, "attack": attack} for r in rows("channel", "adaptive", 200, advantage, hits)]

    entries = summarize([*by("draws", 0.1, 30), *by("picks", -0.2, 160)], judged=["channel"])
    worst = overall(entries, ["channel"])["defenses"]["channel"]
    assert worst["reason"].startswith("picks (adaptive): 80%")
    entries = summarize([*by("draws", 0.45, 30), *by("picks", -0.2, 160)], judged=["channel"])
    assert overall(entries, ["channel"])["defenses"]["channel"]["reason"].startswith("draws")


def test_one_leak_is_a_leak_and_the_worst_defense_counts() -> None:
    found = [
        *WORKING,
        *rows("channel", "adaptive", 200, 0.2),
        *rows("channel", "key-unknown", 200, -0.1),
        *rows("pad", "adaptive", 200, -0.1),
    ]
    entries = summarize(found, judged=["channel", "pad"])
    verdict = overall(entries, ["channel", "pad"])
    assert verdict["defenses"]["channel"]["verdict"] == "leaks"
    assert verdict["defenses"]["pad"]["verdict"] == "holds"
    assert verdict["overall"] == "leaks"
    assert entries[verdict["defenses"]["channel"]["worst"]]["threat"] == "adaptive"


def test_defense_that_nobody_attacked_is_not_said_to_hold() -> None:
    verdict = overall(summarize(ELSEWHERE, judged=["channel"]), ["channel"])
    assert verdict["overall"] == "inconclusive"


def test_key_holder_is_a_control() -> None:
    entries = summarize([*ELSEWHERE, *WORKING], judged=["channel"])
    assert {e["role"] for e in entries} == {"control"}


def test_exit_codes() -> None:
    assert EXIT_CODES == {"holds": 0, "leaks": 1, "inconclusive": 3}


def test_intervals_are_of_the_images() -> None:
    entry = summarize(rows("channel", "adaptive", 4, 0.1, 1, noise=0.02), judged=["channel"])[0]
    # Student's t with 3 degrees: 3.182 * 0.02309 / 2
    assert entry["advantage"]["high"] - entry["advantage"]["mean"] == pytest.approx(
        0.03675, rel=1e-3
    )
    assert entry["identified"]["mean"] == 0.25
    assert entry["identified"]["low"] == pytest.approx(0.00631, rel=1e-2)
    assert entry["lpips"] == {"mean": None, "low": None, "high": None}


def test_images_and_seeds_of_one_victim_count_once() -> None:
    """Five looks at twenty victims are twenty trials: no interval narrows by repetition."""
    once = rows("channel", "adaptive", 20, 0.1, 4, noise=0.02)
    five = [{**row, "image": k} for row in once for k in range(5)]
    alone, repeated = (summarize(found, judged=["channel"])[0] for found in (once, five))
    assert (repeated["n"], repeated["images"]) == (20, 100)
    for name in ("advantage", "identified"):
        assert repeated[name] == pytest.approx(alone[name])


def test_labels_that_were_granted_are_not_found() -> None:
    """Of labels that an attacker was given nobody can say that it is right about them."""
    nothing = {"mean": None, "low": None, "high": None}
    found = [
        {**row, "labels_granted": True, "label_found": None}
        for row in rows("pad", "adaptive", 20, 0.1)
    ]
    (entry,) = summarize(found, judged=["pad"])
    assert entry["labels_right"] == nothing
    assert entry["identified"]["mean"] == 0
    # An attack that finds none by itself is wrong, not excused.
    missed = [{**row, "labels_granted": False, "label_found": None} for row in found]
    assert summarize(missed, judged=["pad"])[0]["labels_right"]["mean"] == 0


def test_part_of_a_victim_widens_the_interval() -> None:
    found = rows("channel", "adaptive", 10, 0.1, 10)
    mixed = [
        {**row, "victim": row["victim"], "identified": k == 0} for row in found for k in (0, 1)
    ]
    rate = summarize(mixed[:-1], judged=["channel"])[0]["identified"]
    assert rate["mean"] == pytest.approx(0.55)
    assert rate["low"] == pytest.approx(0.18709, rel=1e-3)  # 5 of 10
    assert rate["high"] == pytest.approx(0.87845, rel=1e-3)  # 6 of 10


def test_bounds_rise_with_chance() -> None:
    """Ten candidates: a guesser is right one time in ten, which is no leak."""
    found = [*WORKING, *rows("channel", "adaptive", 400, -0.1, 40)]
    entries = summarize(found, judged=["channel"], candidates=100)
    assert overall(entries, ["channel"])["overall"] == "leaks"
    entries = summarize(found, judged=["channel"], candidates=10)
    assert overall(entries, ["channel"])["overall"] == "holds"


@pytest.mark.parametrize(
    "n, hits, candidates, verdict",
    [
        (100, 100, 2, "leaks"),  # a guesser is right half of the time, and never always
        (100, 25, 10, "leaks"),  # from 16.9 %: chance is 10 %
        (400, 40, 10, "holds"),  # up to 13.4 %, at most 15 %
        (400, 180, 2, "holds"),  # up to 50.0 %
        (100, 50, 2, "inconclusive"),  # up to 60 %
        (400, 0, 1000, "holds"),
        (400, 20, 1000, "leaks"),  # from 3.1 %
        (1000, 20, 1000, "leaks"),  # from 1.2 %, 12 times chance
    ],
)
def test_bounds_are_an_excess_over_chance(n: int, hits: int, candidates: int, verdict: str) -> None:
    found = [*WORKING, *rows("channel", "adaptive", n, -0.1, hits)]
    entries = summarize(found, judged=["channel"], candidates=candidates)
    entry = next(e for e in entries if e["role"] == "defense")
    assert entry["verdict"] == verdict, entry["reason"]


@pytest.mark.parametrize("hits, verdict", [(8, "inconclusive"), (2, "holds")])
def test_more_candidates_do_not_make_it_easier_to_hold(hits: int, verdict: str) -> None:
    """8 of 1,000 (up to 1.6 %) are eight times chance, which is 0.1 %."""
    found = [*WORKING, *rows("channel", "adaptive", 1000, -0.1, hits)]
    entries = summarize(found, judged=["channel"], candidates=1000, feed_forward=["a"])
    entry = next(e for e in entries if e["role"] == "defense")
    assert entry["verdict"] == verdict, entry["reason"]


def test_bound_in_the_reason_is_the_one_that_counted() -> None:
    found = [*WORKING, *rows("channel", "adaptive", 100, -0.1, 90)]
    entry = summarize(found, judged=["channel"], candidates=30)[-1]
    assert "more than 4.33%." in entry["reason"]
    entry = summarize(found, judged=["channel"])[-1]
    assert "more than 2%." in entry["reason"]


def absent(attack: str, threat: str, defense: str = "channel") -> dict[str, str]:
    return {"defense": defense, "attack": attack, "threat": threat}


def judged(*skipped: dict[str, str], threats: tuple[str, ...] = ("adaptive",)) -> dict[str, Any]:
    """The verdict on a defense that holds against ``a`` under ``threats``."""
    found = [row for threat in threats for row in rows("channel", threat, 200, -0.1)]
    crafted = rows("norm", "crafting", 200, 0.3, 150)
    entries = summarize([*WORKING, *crafted, *found], judged=["channel"])
    verdict: dict[str, Any] = overall(entries, ["channel"], skipped)["defenses"]["channel"]
    return verdict


def test_attacks_that_were_not_mounted_are_named_with_their_threat() -> None:
    verdict = judged(absent("peel", "adaptive"), absent("ggl", "adaptive", defense="norm"))
    assert verdict["verdict"] == "holds"
    assert verdict["left_out"] == [{"attack": "peel", "threat": "adaptive"}]
    assert "nothing is said of: peel (adaptive)." in verdict["reason"]


def test_attack_that_was_mounted_under_another_threat_is_not_contradicted() -> None:
    verdict = judged(absent("a", "crafting"), threats=("adaptive",))
    assert verdict["verdict"] == "inconclusive"
    assert verdict["worst"] is None  # no cell decided
    assert "no attack could be mounted under crafting." in verdict["reason"]
    assert "a (adaptive): advantage at most" in verdict["reason"]
    assert "nothing is said of: a (crafting)." in verdict["reason"]
    # With another attack under that threat something is said of it.
    verdict = judged(absent("b", "crafting"), threats=("adaptive", "crafting"))
    assert verdict["verdict"] == "holds"
    assert "nothing is said of: b (crafting)." in verdict["reason"]


def test_attack_without_an_optimizer_stands_for_all_threats_that_are_alike_to_it() -> None:
    """It is mounted once, so another that fails under its twin leaves no threat bare."""
    entries = summarize([*WORKING, *rows("channel", "adaptive", 200, -0.1)], judged=["channel"])
    skipped = [absent("b", "key-unknown")]
    alone = overall(entries, ["channel"], skipped)["defenses"]["channel"]
    assert alone["verdict"] == "inconclusive"
    found = overall(entries, ["channel"], skipped, feed_forward=["a"])["defenses"]["channel"]
    assert found["verdict"] == "holds"
    assert "nothing is said of: b (key-unknown)." in found["reason"]
    crafting = overall(entries, ["channel"], [absent("b", "crafting")], feed_forward=["a"])
    assert crafting["overall"] == "inconclusive"


def test_leak_stays_one_whatever_was_not_mounted() -> None:
    entries = summarize([*WORKING, *rows("channel", "adaptive", 50, 0.2)], judged=["channel"])
    verdict = overall(entries, ["channel"], [absent("a", "crafting")])["defenses"]["channel"]
    assert verdict["verdict"] == "leaks"
    assert "nothing is said of: a (crafting)." in verdict["reason"]


def test_key_holder_that_was_not_mounted_is_no_gap_of_the_verdict() -> None:
    verdict = judged(absent("a", "key-shared"))
    assert (verdict["verdict"], verdict["left_out"]) == ("holds", [])
    assert "Not mounted" not in verdict["reason"]


def test_attack_that_was_mounted_with_some_seeds_is_said_to_be() -> None:
    verdict = judged(absent("a", "adaptive"))
    assert verdict["verdict"] == "holds"
    assert "Mounted with some of the seeds alone: a (adaptive)." in verdict["reason"]
    assert "nothing is said" not in verdict["reason"]


def without(found: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """``count`` victims could not be attacked: their rows hold the floor's figures."""
    guess = {"advantage": 0.0, "identified": False, "left_out": "the gradient is zero."}
    return [{**row, **guess} if row["victim"] < count else row for row in found]


@pytest.mark.parametrize(
    "mine, verdict",
    [
        # The hard ones are gone, and what is left would hold.
        (without(rows("channel", "adaptive", 200, -0.1), 150), "inconclusive"),
        (without(rows("channel", "adaptive", 200, -0.1), 5), "inconclusive"),
        (without(rows("channel", "adaptive", 2000, -0.1), 5), "holds"),  # 5 of 2,000: below 1 %
        (without(rows("channel", "adaptive", 200, 0.3, 200), 20), "leaks"),
    ],
)
def test_nobody_holds_because_the_hard_victims_vanished(
    mine: list[dict[str, Any]], verdict: str
) -> None:
    entries = summarize([*WORKING, *mine], judged=["channel"], feed_forward=["a"])
    entry = next(e for e in entries if e["role"] == "defense")
    assert entry["verdict"] == verdict, entry["reason"]
    assert entry["left_out"] in (5, 20, 150)
    assert f"{entry['left_out']} of {entry['n']} victims were beyond" in entry["reason"]


def test_without_anyone_left_out_the_ceiling_is_the_bound() -> None:
    (entry,) = summarize(rows("channel", "adaptive", 20, 0.1, 3), judged=["channel"])
    assert entry["left_out"] == 0
    assert entry["ceiling"]["advantage"] == entry["advantage"]["high"]
    assert entry["ceiling"]["identified"] == entry["identified"]["high"]
