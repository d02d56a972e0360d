"""The parts of the audit page: what is refused, what stands where, and how figures look."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_audit import LABELS, STRENGTH, write_fake_audit
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedkl.audit import verdicts
from fedkl.errors import CheckpointError
from fedkl.report.audit import words
from fedkl.report.audit.facts import Interval
from fedkl.report.audit.gallery import FILM_BYTES, films, heroes
from fedkl.report.audit.grid import columns, matrix
from fedkl.report.audit.pictures import Album
from fedkl.report.audit.plots import STRIP_WIDTH, Curve, chart, scatter, strip, ticks
from fedkl.report.audit.reading import read_audit
from fedkl.report.audit_page import write_audit_page


def rewrite(folder: Path, audit: Any) -> None:
    (folder / "audit.json").write_text(json.dumps(audit), encoding="utf-8")


BROKEN: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("not valid JSON", lambda audit: None),
    ("its format is 'list'", lambda audit: [audit]),
    ("its format is 'other'", lambda audit: audit | {"format": "other"}),
    ("version 2", lambda audit: audit | {"version": 2}),
    ("'rows' is dict, expected a list", lambda audit: audit | {"rows": {}}),
    ("'config' is list, expected an object", lambda audit: audit | {"config": [1]}),
    ("summary[0] is int", lambda audit: audit | {"summary": [3]}),
    ("summary[0] names no attack", lambda audit: audit | {"summary": [{}]}),
    ("pictures[0] names no defense", lambda audit: audit | {"pictures": [{"attack": "a"}]}),
    ("'maybe', expected one of leaks", lambda audit: audit | {"verdict": {"overall": "maybe"}}),
    (
        "verdict.defenses['pad'] is str",
        lambda audit: audit | {"verdict": {"defenses": {"pad": ""}}},
    ),
    ("threats['x'] is int", lambda audit: audit | {"threats": {"x": 1}}),
]


@pytest.mark.parametrize("message, spoil", BROKEN, ids=[message for message, _ in BROKEN])
def test_what_is_no_audit_is_refused(
    message: str, spoil: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    audit = write_fake_audit(tmp_path)
    spoiled = spoil(audit)
    whole = (tmp_path / "audit.json").read_bytes()
    data = whole[:1000] if spoiled is None else json.dumps(spoiled).encode()
    (tmp_path / "audit.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        write_audit_page(tmp_path)
    assert str(tmp_path / "audit.json") in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_missing_audit_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No such file.*fedkl audit"):
        write_audit_page(tmp_path)


def test_columns_come_controls_first_and_key_holder_last(tmp_path: Path) -> None:
    audit = write_fake_audit(tmp_path)
    audit["summary"].reverse()
    rewrite(tmp_path, audit)
    order = columns(read_audit(tmp_path / "audit.json"))
    assert [x.defense for x in order[:3]] == ["none", "norm", "fedbn"]
    assert [x.defense for x in order[3:]] == ["channel"] * 3 + ["pad"] * 3
    assert [x.threat for x in order].count("key-shared") == 2
    assert order[5].threat == order[8].threat == "key-shared"
    assert [x.control for x in order] == [True] * 3 + [False, False, True] * 2


def test_picture_beside_a_verdict_is_the_median_one(tmp_path: Path) -> None:
    audit = write_fake_audit(tmp_path)
    mine = [
        one
        for one in audit["pictures"]
        if (one["attack"], one["defense"], one["threat"])
        == ("inverting-gradients", "channel", "adaptive")
    ]
    for one, ssim in zip(mine, (0.9, 0.1, 0.8, 0.3, 0.2), strict=True):
        one["ssim"] = ssim
    rewrite(tmp_path, audit)
    found = read_audit(tmp_path / "audit.json")
    first = heroes(found, columns(found), Album(tmp_path))[0]
    assert first.judgment.defense == "channel"
    assert first.tile is not None
    assert first.tile.ssim == 0.3


def test_rules_on_the_page_are_those_of_the_audit(tmp_path: Path) -> None:
    write_fake_audit(tmp_path)
    text = " ".join(write_audit_page(tmp_path).read_text(encoding="utf-8").split())
    leaks = f"advantage is above +{verdicts.ADVANTAGE_LEAKS}, or that of identification above "
    assert leaks + f"{100 * verdicts.IDENTIFIED_LEAKS:.0f} %" in text
    bounds = f"at most +{verdicts.ADVANTAGE_HOLDS} and {100 * verdicts.IDENTIFIED_HOLDS:.0f} %"
    few = f" ({100 * verdicts.IDENTIFIED_HOLDS_FEW:.0f} % for attacks by optimization, on "
    assert bounds + few + f"{verdicts.FEW} victims or more)" in text
    assert f"by at least {verdicts.WORKS:.2f} with the key of the same defense" in text


def test_films_take_turns_until_the_page_is_full(tmp_path: Path) -> None:
    audit = write_fake_audit(tmp_path)
    sprites = [one["sprite"] for one in audit["pictures"] if one["sprite"]]
    noise = np.random.default_rng(0).integers(0, 256, (320, 640, 3), dtype=np.uint8)
    for i, one in enumerate(audit["pictures"]):
        one["sprite"] = sprites[i % len(sprites)]
    rewrite(tmp_path, audit)
    found = read_audit(tmp_path / "audit.json")
    few, left = films(found, columns(found), Album(tmp_path))
    assert len(few) + left == len(LABELS) * len(STRENGTH)
    assert [film.attack for film in few] == (list(STRENGTH) * len(LABELS))[: len(few)]
    Image.fromarray(noise).save(tmp_path / sprites[0])
    one_film, rest = films(found, columns(found), Album(tmp_path))
    assert (len(one_film), rest) == (1, len(LABELS) * len(STRENGTH) - 1)
    assert len(one_film[0].tracks[0].sprite.uri) > FILM_BYTES


def test_rows_of_a_cell_become_its_dots(tmp_path: Path) -> None:
    audit = write_fake_audit(tmp_path)
    found = read_audit(tmp_path / "audit.json")
    assert set(found.advantages) == {one.cell for one in found.summaries}
    assert sum(len(x) for x in found.advantages.values()) == len(audit["rows"])


@pytest.mark.parametrize(
    "value, known",
    [
        (True, {"advantage": True, "identified": True}),
        ({"advantage": False, "identified": None}, {"advantage": False}),
        (None, {}),
        ("yes", {}),
    ],
)
def test_works_may_be_one_answer_or_one_per_metric(
    value: Any, known: dict[str, bool], tmp_path: Path
) -> None:
    audit = write_fake_audit(tmp_path)
    audit["summary"][0]["works"] = value
    rewrite(tmp_path, audit)
    one = read_audit(tmp_path / "audit.json").summaries[0]
    assert one.works == known
    assert "works" not in one.figures


@pytest.mark.parametrize(
    "value, metric, shown",
    [
        (0.314, "ssim", "0.31"),
        (-0.018, "ssim", "−0.02"),
        (0.305, "advantage", "+0.30"),
        (-0.001, "advantage", "0.00"),
        (0.013, "identified", "1.3 %"),
        (0.85, "identified", "85 %"),
        (1.0, "success", "100 %"),
        (28.14, "psnr", "28.1"),
        (0.00123, "mse", "0.00123"),
        (None, "psnr", "–"),
    ],
)
def test_figures(value: float | None, metric: str, shown: str) -> None:
    assert words.figure(value, metric) == shown


@pytest.mark.parametrize(
    "defense, shown",
    [("norm", "ordinary norm"), ("pad", "pad"), ("pad+noise", "pad + clipping and noise"),
     ("norm+prune", "ordinary norm + pruning"), ("none + prune", "pruning"),
     ("pad+prune", "pad + pruning"), ("none", "undefended")],
)  # fmt: skip
def test_compositions_are_named_by_their_parts(defense: str, shown: str) -> None:
    assert words.defense_name(defense) == shown


def test_unknown_bounds_are_one_dash() -> None:
    assert words.span(Interval(0.1, None, 0.2), "advantage") == "–"
    assert words.span(Interval(0.1, 0.0, 0.2), "advantage") == "0.00 to +0.20"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-6 * width <= x <= low + width * (1 + 1e-6) for x in found)
    assert found == sorted(set(found))


def test_curves_rise_upwards_and_gaps_are_left_out() -> None:
    drawn = chart([Curve("a", 0, 0, [0, 10, 20], [0.0, None, 1.0])])
    assert drawn is not None
    (x0, y0), (x1, y1) = (
        tuple(map(float, point.split())) for point in drawn.traces[0].path[1:].split("L")
    )
    frame = drawn.frame
    assert (x0, x1) == (frame.left, frame.right)
    assert (y0, y1) == (frame.bottom, frame.top)
    assert chart([Curve("a", 0, 0, [0], [None])]) is None


@pytest.mark.parametrize(
    "values, log", [((1.0, 0.001), True), ((1.0, 0.5), False), ((1.0, 0.0), False)]
)
def test_logarithmic_only_where_it_can_be(values: tuple[float, float], log: bool) -> None:
    drawn = chart([Curve("a", 0, 0, [0, 1], values)], logarithmic=True)
    assert drawn is not None
    assert drawn.log is log


def test_strip_keeps_order_and_stays_inside() -> None:
    drawn = strip(Interval(0.2, 0.1, 0.3), [x / 100 for x in range(-50, 150)], (-0.1, 0.5))
    assert drawn is not None
    assert drawn.mean is not None
    assert drawn.low is not None
    assert drawn.high is not None
    assert 0 < drawn.zero < drawn.limit < drawn.low < drawn.mean < drawn.high < STRIP_WIDTH
    assert len(drawn.dots) == 60
    assert all(0 < x < STRIP_WIDTH for x, _ in drawn.dots)
    assert strip(Interval(), [], (-0.1, 0.5)) is None


def test_scatter_puts_accurate_up_and_leaky_right() -> None:
    drawn = scatter([("good", 0, Interval(0.0), 0.9), ("bad", 1, Interval(0.5), 0.6)])
    assert drawn is not None
    good, bad = drawn.points
    assert good.name == "good"
    assert good.x < bad.x
    assert good.y < bad.y
    assert good.x == drawn.zero
    assert scatter([("x", 0, Interval(), 0.5)]) is None


def test_identification_heats_a_cell_as_pictures_do(tmp_path: Path) -> None:
    """An attack that recognizes images shows nothing in the advantage, whatever it finds."""

    def heats(advantage: float, identified: float) -> tuple[float, bool]:
        audit = write_fake_audit(tmp_path)
        for one in audit["summary"]:
            one["advantage"] |= {"mean": advantage}
            one["identified"] |= {"mean": identified}
            one["floor_identified"] = {"mean": 0.01, "low": 0.0, "high": 0.05}
        rewrite(tmp_path, audit)
        known = read_audit(tmp_path / "audit.json")
        cell = matrix(known, columns(known)).lines[0].cells[0]
        assert cell is not None
        return cell.heat, cell.cool

    assert heats(-0.2, 0.01) == (0.0, True)
    assert heats(-0.2, 0.26) == (0.5, False)
    assert heats(0.125, 0.01) == (0.5, False)
    assert heats(0.125, 1.0)[0] > 0.9


@pytest.mark.parametrize("attack", ["retrieval", "replay-matched", "shadow-label"])
def test_pictures_of_who_recognizes_are_said_to_be_public(attack: str, tmp_path: Path) -> None:
    audit = write_fake_audit(tmp_path)
    text = json.dumps(audit).replace("inverting-gradients", attack)
    (tmp_path / "audit.json").write_text(text, encoding="utf-8")
    page = write_audit_page(tmp_path).read_text(encoding="utf-8")
    assert ("This attack draws nothing" in page) == words.recognizes(attack)
    # What the order within a batch owes to the truth, and what the attack is told.
    assert "in the order that fits the true images best" in page
    assert "told the class of each" in page
    assert ("public image<br>that fits best" in page) == words.recognizes(attack)
    assert words.recognizes("retrieval+fishing")
    assert words.recognizes("replay")
    assert words.recognizes("replay-matched+fishing")
    assert not words.recognizes("closed-form")
