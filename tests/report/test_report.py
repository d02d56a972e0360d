"""One page, everything in it, nothing taken for markup, and a verdict that follows the figures."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedkl.errors import OutputError
from fedkl.report import arms_curves, run_curves, write_report
from fedkl.report.verdict import verdict

EVIL = "<script>alert('x')</script>\"&'"


def row(
    name: str, defense: str, own: float, wrong: float | None = None, **more: Any
) -> dict[str, Any]:
    accuracy = {
        "own_key": own,
        "wrong_key": wrong,
        "wrong_key_p95": more.pop("p95", wrong),
        "other_client": None if wrong is None else own,
        "outsider": more.pop("outsider", own),
        "no_lock": more.pop("no_lock", own),
    }
    if "guess" in more:
        accuracy["guess"] = more.pop("guess")
    line = {"round": 1, "loss": 0.5, "accuracy": accuracy}
    return {
        "name": name,
        "meaning": f"meaning of {name}",
        "method": "fedavg",
        "defense": defense,
        "rounds": 2,
        "seconds": 3.4,
        "accuracy": accuracy,
        "validation": [line, {**line, "round": 2}],
        "config": {"seed": 0, "training": {"lr": own}},
        "data": "somewhere",
        **more,
    }


NORM = row("plain", "norm", 0.85)
LOCKED = row("locked", "channel", 0.845, 0.12, p95=0.2, outsider=0.1)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def page(folder: Path, rows: list[dict[str, Any]], **options: Any) -> str:
    path = write_report(folder, rows, **{"title": "T", **options})
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_page_holds_rows_settings_command_and_versions(tmp_path: Path) -> None:
    text = page(tmp_path, [NORM, LOCKED], command="fedkl demo --out x", versions={"torch": "9.9"})
    for part in ("meaning of plain", "84.5 %", "12.0 %", "fedkl demo --out x", "torch 9.9", "seed"):
        assert part in text
    assert text.index("training.lr") < text.index(">seed<")  # what differs comes first
    assert "Insiders" in text
    assert "labelled images" in text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_page_is_self_contained_and_needs_no_script(tmp_path: Path) -> None:
    parser = Tags()
    parser.feed(page(tmp_path, [NORM, LOCKED]))
    names = {tag for tag, _ in parser.tags}
    assert not names & {"script", "link", "iframe", "object"}
    sources = [a[n] for _, a in parser.tags for n in ("src", "srcset", "href") if n in a]
    assert len(sources) == 2  # light and dark
    assert all(str(source).startswith("data:image/png;base64,") for source in sources)
    assert sources[0] != sources[1]
    assert all("alt" in a for tag, a in parser.tags if tag == "img")


def test_hostile_names_are_text(tmp_path: Path) -> None:
    rows = [row(EVIL, EVIL, 0.5, meaning=EVIL, data=EVIL, config={EVIL: EVIL}), LOCKED]
    text = page(tmp_path, rows, title=EVIL, command=EVIL, versions={EVIL: EVIL}, notes=[EVIL])
    assert "<script" not in text
    parser = Tags()
    parser.feed(text)
    assert not any(tag == "script" for tag, _ in parser.tags)
    assert html.unescape(text).count(EVIL) >= 9


def test_bars_are_as_long_as_the_figures(tmp_path: Path) -> None:
    widths = re.findall(r"style=\"width: ([\d.]+)%", page(tmp_path, [LOCKED]))
    assert widths == ["84.5", "12.0", "20.0", "84.5", "10.0", "84.5"]


def test_page_without_evaluations_has_no_picture(tmp_path: Path) -> None:
    assert "<picture" not in page(tmp_path, [row("a", "none", 0.5, validation=[])])


def test_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"report\.html"):
        write_report(tmp_path / "missing", [NORM], title="T")


@pytest.mark.parametrize(
    "rows, word, said",
    [
        ([NORM, LOCKED], "holds", "costs 0.5 points"),
        ([row("p", "norm", 0.84), LOCKED], "holds", "gains 0.5 points"),
        ([row("p", "norm", 0.87), LOCKED], "open", "costs 2.5 points"),
        ([LOCKED], "open", "not known"),
        (
            [NORM, LOCKED, row("pads", "pad", 0.85, 0.4)],
            "does not hold",
            "(pads) is right on 85.0 %",
        ),
        ([NORM, row("pads", "pad", 0.8, 0.1, outsider=0.1), LOCKED], "open", "costs 5.0 points"),
        ([NORM], "open", "No row here is locked"),
        ([NORM, row("l", "channel", 0.85, 0.21, outsider=0.1)], "does not hold", "wrong keys get"),
        ([NORM, row("l", "channel", 0.85, 0.1, p95=0.4, outsider=0.1)], "does not hold", "95th"),
        ([NORM, row("l", "channel", 0.85, 0.1, outsider=0.79)], "does not hold", "a thief"),
        ([NORM, LOCKED], "holds", "Insiders are not kept out"),
        # Nothing is kept from anybody where nothing was learned.
        (
            [row("p", "norm", 0.1), row("l", "pad", 0.1, 0.1, outsider=0.1, no_lock=0.1)],
            "open",
            "learned too little",
        ),
        ([row("p", "norm", 0.35), row("l", "pad", 0.35, 0.1, outsider=0.1)], "open", "too little"),
        ([row("p", "norm", 0.36), row("l", "pad", 0.36, 0.1, outsider=0.1)], "holds", "cannot use"),
        ([NORM, row("l", "pad", 0.1, 0.3, outsider=0.1)], "does not hold", "wrong keys get"),
    ],
)
def test_verdict_follows_the_figures(rows: list[dict[str, Any]], word: str, said: str) -> None:
    found = verdict(rows)
    assert found.word == word
    assert said in " ".join(found.paragraphs)


@pytest.mark.parametrize(
    "guess, kept, out, learned",
    # With two classes alike a thief who guesses is right on half; with a hundred on one in 100.
    [(0.5, 0.55, 0.56, 0.64), (0.01, 0.119, 0.121, 0.286), (0.9, 0.911, 0.912, 0.928)],
)
def test_bounds_go_with_what_guessing_gets(
    guess: float, kept: float, out: float, learned: float
) -> None:
    def said(own: float, others: float) -> Any:
        norm = row("p", "norm", own, guess=guess)
        return verdict([norm, row("l", "pad", own, others, outsider=others, guess=guess)])

    assert said(0.99, kept).word == "holds"
    assert said(0.99, out).word == "does not hold"
    assert f"gets {100 * guess:.1f} %" in said(0.99, out).paragraphs[0]
    assert said(learned + 0.002, guess).word == "holds"
    assert said(learned - 0.002, guess).word == "open"


def test_what_outsiders_get_is_not_said_of_insiders() -> None:
    found = verdict([NORM, row("l", "channel", 0.85, 0.1, outsider=0.79, no_lock=0.79)])
    assert "a thief without a key gets" in found.paragraphs[0]
    assert "Insiders" not in found.paragraphs[0]


def test_norm_of_another_method_is_no_comparison() -> None:
    assert verdict([{**NORM, "method": "centralized"}, LOCKED]).word == "open"


def test_curves_are_pictures_for_either_page() -> None:
    lines = LOCKED["validation"]
    pictures = {run_curves(lines), run_curves(lines, dark=True)}
    pictures |= {run_curves(NORM["validation"], title="$x_"), run_curves(lines[:1])}
    many = {f"${number}_": lines for number in range(9)}
    pictures |= {arms_curves(many), arms_curves(many, dark=True)}
    assert len(pictures) == 6
    assert all(picture.startswith(b"\x89PNG\r\n") for picture in pictures)


def test_report_does_not_load_torch() -> None:
    code = "import sys, fedkl.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
