"""The audit page from made-up audits: whole, escaped, and honest about what is not there."""

from __future__ import annotations

import base64
import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_audit import LABELS, SEEN, STRENGTH, write_fake_audit
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkl.errors import FedKLError, OutputError
from fedkl.report.audit import words
from fedkl.report.audit_page import write_audit_page

EVIL = (
    "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"' javascript:alert(2) "
    "{{ 7777 * 3 }}"
)
DRAWN = {"svg", "path", "line", "circle", "text", "td"}
VOID = {"meta", "link", "input", "br", "img", "line", "path", "use", "image", "circle"}
PARTS = (
    *("config", "command", "versions", "data", "cost", "verdict", "threats", "controls"),
    *("accuracy", "summary", "rows", "pictures", "skipped", "left_out", "caveats", "certificate"),
)
NOTHING = re.compile(r"\b(None|NaN|nan|undefined|Undefined|inf|Infinity)\b|\[\]|\{\}")


class Page(HTMLParser):
    """Tags with attributes, and the text that a reader sees or hears."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        self.texts += [found[name] for name in ("aria-label", "title", "alt") if name in found]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.texts.append(data)

    def close(self) -> None:
        super().close()
        assert self._open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def build(folder: Path, **changes: Any) -> Page:
    write_fake_audit(folder, **changes)
    return read(write_audit_page(folder))


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    page.close()
    assert not NOTHING.search(page.text), NOTHING.search(page.text)
    drawn = [
        value
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if tag in DRAWN and name not in {"aria-label", "href"}
    ]
    assert not [value for value in drawn if re.search(r"nan|inf|None", value)]
    return page


def rewrite(folder: Path, audit: Any) -> None:
    (folder / "audit.json").write_text(json.dumps(audit), encoding="utf-8")


Small = tuple[Path, dict[str, Any]]
"""A folder and what its audit.json held at first."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("small")
    audit = write_fake_audit(folder)
    for name, count in {"summary": 4, "rows": 3, "pictures": 6}.items():
        audit[name] = audit[name][:count]
    return folder, audit


def test_tells_the_verdict_the_threat_and_why(tmp_path: Path) -> None:
    text = build(tmp_path).text
    top = text[: text.index("What the attacker gets")]
    for part in (
        "Yes: it leaks",
        "channel ✕ leaks",
        "pad ✓ holds",
        "Knows everything but the key and the private tensors, and searches for both.",
        "An attacker who frees scale and shift sees what the key holder sees.",
        "SSIM 0.52",
    ):
        assert part in top
    assert "fedkl audit --run runs/kl --defenses channel,pad --out runs/audit" in text
    assert "training.lr 0.05" in text
    assert "training.momentum –" in text


@pytest.mark.parametrize(
    "overall, sentence",
    [
        ("holds", "it holds"),
        ("inconclusive", "Not known: inconclusive"),
        (None, "No verdict"),
    ],
)
def test_heading_follows_the_verdict(overall: str | None, sentence: str, tmp_path: Path) -> None:
    text = build(tmp_path, verdict={"overall": overall, "defenses": {}}).text
    assert sentence in text
    assert "Yes: it leaks" not in text
    assert "No defense was judged" in text


def test_shows_every_reconstruction_with_its_figures(tmp_path: Path) -> None:
    page = build(tmp_path)
    cases = sum(len(threats) for threats in SEEN.values())
    shown = [x["aria-label"] for x in page.all("svg") if "aria-label" in x]
    # Galleries, the two verdicts, and the two films of inverting gradients.
    tiles = [x for x in shown if x.startswith("reconstruction, ")]
    assert len(tiles) == cases * len(LABELS) * len(STRENGTH) + 2 * cases
    assert sum(x.startswith("reconstruction by") for x in shown) == 2
    for label in LABELS:
        assert shown.count(f"true image, {label}") >= len(STRENGTH)
    galleries = page.text[page.text.index("What the attacker gets") :]
    seen = [x for threats in SEEN.values() for x in threats.values()]
    figures = [f"SSIM {x + 0.02:.2f} ● identified" for x in seen if x > 0.3]
    figures += [f"SSIM {x + 0.02:.2f} ○ not identified" for x in seen if x <= 0.3]
    assert all(figure in galleries for figure in figures)


def test_each_file_is_embedded_once(tmp_path: Path) -> None:
    path = write_fake_audit(tmp_path) and write_audit_page(tmp_path)
    text = path.read_text(encoding="utf-8")
    for name in sorted((tmp_path / "pictures").iterdir()):
        assert text.count(base64.b64encode(name.read_bytes()).decode()) == 1, name


def test_loads_nothing_and_runs_one_script(tmp_path: Path) -> None:
    page = build(tmp_path)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"src", "srcset", "action", "data", "poster"}:
                raise AssertionError((tag, name))
            if name in {"href", "xlink:href"}:
                assert value.startswith(("#", "data:")), (tag, value)
    assert page.all("script") == [{}]
    policy = next(x for x in page.all("meta") if "http-equiv" in x)["content"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert not re.search(r"url\(|@import", (tmp_path / "report.html").read_text(encoding="utf-8"))


def test_references_resolve_and_ids_are_unique(tmp_path: Path) -> None:
    page = build(tmp_path)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = [x["href"][1:] for tag in ("a", "use") for x in page.all(tag)]
    used += [x["aria-labelledby"] for _, x in page.tags if "aria-labelledby" in x]
    assert set(used) <= set(ids)


def test_every_cell_of_the_matrix_has_figure_interval_count_and_verdict(tmp_path: Path) -> None:
    audit = write_fake_audit(tmp_path)
    text = read(write_audit_page(tmp_path)).text
    for one in audit["summary"]:
        x = one["advantage"]
        cell = (
            f"{words.signed(x['mean'])} {words.signed(x['low'])} to {words.signed(x['high'])} "
            f"identified {words.percent(one['identified']['mean'])} 20 victims"
        )
        assert cell in text
    assert "In all cells: final model, batch 1, local steps 1" in text


def evil(value: Any) -> Any:
    """Every string replaced, as keys too, but for the few that have a fixed meaning."""
    kept = {"fedkl-audit", "leaks", "holds", "inconclusive", "control", "defense"}
    if isinstance(value, dict):
        return {k: evil(v) for k, v in value.items()}
    if isinstance(value, list):
        return [evil(x) for x in value]
    if isinstance(value, str) and value not in kept and not value.startswith("pictures/"):
        return f"{value} {EVIL}"
    return value


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    audit = evil(write_fake_audit(tmp_path))
    for name in ("config", "threats", "accuracy", "versions", "certificate"):
        audit[name][EVIL] = copy.deepcopy(next(iter(audit[name].values())))
    audit["verdict"]["defenses"][EVIL] = {"verdict": "leaks", "worst": None, "reason": EVIL}
    audit["pictures"][0]["truth"] = EVIL
    rewrite(tmp_path, audit)
    page = read(write_audit_page(tmp_path))
    assert page.all("script") == [{}]
    assert page.all("img") == []
    assert EVIL in page.text
    assert not [name for _, x in page.tags for name in x if name.startswith("on")]
    assert "23331" not in page.text


def nulled(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: nulled(v) for k, v in value.items()}
    if isinstance(value, list):
        return [nulled(x) for x in value]
    return None if isinstance(value, int | float) else value


@pytest.mark.parametrize(
    "name", ["summary", "rows", "pictures", "accuracy", "certificate", "config"]
)
def test_null_numbers_are_dashes(name: str, small: Small) -> None:
    folder, audit = small
    rewrite(folder, audit | {name: nulled(audit[name])})
    assert words.DASH in read(write_audit_page(folder)).text


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("how", ["missing", "null", "empty"])
def test_any_part_may_be_absent(name: str, how: str, small: Small) -> None:
    folder, audit = small
    audit = dict(audit)
    if how == "missing":
        del audit[name]
    else:
        audit[name] = None if how == "null" else type(audit[name])()
    rewrite(folder, audit)
    read(write_audit_page(folder))


def test_nothing_but_the_format_is_enough(tmp_path: Path) -> None:
    rewrite(tmp_path, {"format": "fedkl-audit", "version": 1})
    text = read(write_audit_page(tmp_path)).text
    for sentence in ("No verdict", "kept no pictures", "Nothing was measured", "not recorded"):
        assert sentence in text
    assert "What the protection costs" not in text
    assert "Certificate" not in text


def test_without_accuracy_no_section_about_it(tmp_path: Path) -> None:
    text = build(tmp_path, accuracy={"channel": None, "pad": {"own_key": None}}).text
    assert "What the protection costs" not in text


@pytest.mark.parametrize(
    "candidates, chance, bound",
    [(100, "1 %", "2 %"), (10, "10 %", "11 %"), (200, "0.5 %", "1.5 %")],
)
def test_words_go_by_the_number_of_candidates(
    tmp_path: Path, candidates: int, chance: str, bound: str
) -> None:
    text = build(tmp_path, config={"candidates": candidates}).text
    assert f"the nearest of {candidates} of its class" in text
    assert f"Among {candidates} images of the same class" in text
    assert f"Chance alone reaches {chance}." in text
    assert f"or that of identification above {bound}." in text


@pytest.mark.parametrize("decided", [True, False])
def test_leakage_beside_accuracy_is_of_the_cell_that_decided(tmp_path: Path, decided: bool) -> None:
    """A leak by identification alone decides, however great the advantage of others is."""
    audit = write_fake_audit(tmp_path)
    cells = [(i, x) for i, x in enumerate(audit["summary"]) if x["defense"] == "pad"]
    i, cell = next((i, x) for i, x in cells if (x["threat"], x["attack"]) == ("adaptive", "dlg"))
    cell["advantage"] = {"mean": -0.31, "low": -0.4, "high": -0.2}
    cell["identified"] = {"mean": 0.77, "low": 0.6, "high": 0.9}
    audit["verdict"]["defenses"]["pad"]["worst"] = i if decided else None
    rewrite(tmp_path, audit)
    text = read(write_audit_page(tmp_path)).text
    section = text[text.index("What the protection costs") :]
    row = section[section.index(" pad 85 %") :][:60]
    assert ("−0.31 dlg 77 %" in row) == decided, row
    assert ("– –" in row) == (not decided), row


def test_labels_that_were_granted_are_a_dash(tmp_path: Path) -> None:
    audit = write_fake_audit(tmp_path)
    for one in audit["summary"]:
        granted = one["defense"] == "pad"
        half = None if granted else 0.5
        one["labels_right"] = {"mean": half, "low": half, "high": half}
    rewrite(tmp_path, audit)
    text = read(write_audit_page(tmp_path)).text
    assert "labels right" in text
    assert "50 % (50 % to 50 %)" in text
    assert "None" not in text


def test_caveats_stand_under_the_verdict(tmp_path: Path) -> None:
    text = build(tmp_path, caveats=["The control is <b>nearly</b> untrained."]).text
    assert "Note. The control is <b>nearly</b> untrained." in text


def test_what_was_left_out_is_told(tmp_path: Path) -> None:
    text = build(tmp_path).text
    assert "Left out: 2 final_pad_ggl no generator for 1 channel" in text
    assert "final_pad_peel, victim 3 a gradient of zero" in text


def test_one_defense_alone(tmp_path: Path) -> None:
    audit = write_fake_audit(tmp_path)
    for name in ("summary", "rows", "pictures"):
        audit[name] = [x for x in audit[name] if x["defense"] == "channel"]
    rewrite(tmp_path, audit)
    text = read(write_audit_page(tmp_path)).text
    assert "undefended +" not in text
    assert "adaptive attacker" in text


def outside(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Names that lead out of the folder, to PNG files that exist."""
    source = (folder / "pictures/truth-0.png").read_bytes()
    # Something after the end of the picture tells it from all others.
    for i, name in enumerate(("../secret.png", str(folder.parent / "secret.png"), "link.png")):
        yield name, source + b"secret%d" % i


def test_nothing_outside_of_the_folder_is_embedded(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    audit = write_fake_audit(folder)
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    for name, data in outside(folder):
        (folder.parent / "secret.png").write_bytes(data)
        changed = copy.deepcopy(audit)
        changed["pictures"][0]["reconstruction"] = name
        rewrite(folder, changed)
        page = write_audit_page(folder)
        assert base64.b64encode(data).decode()[-40:] not in page.read_text(encoding="utf-8")
        assert "1 file named as pictures was not embedded" in read(page).text


def test_missing_and_broken_pictures_are_told(tmp_path: Path) -> None:
    audit = write_fake_audit(tmp_path)
    audit["pictures"][0]["reconstruction"] = "pictures/nowhere.png"
    audit["pictures"][1]["reconstruction"] = "pictures/\0.png"
    audit["pictures"][2]["reconstruction"] = "audit.json"
    audit["pictures"][3]["sprite"] = "pictures"
    rewrite(tmp_path, audit)
    page = read(write_audit_page(tmp_path))
    assert "3 pictures could not be found." in page.text
    assert "1 file named as pictures was not embedded" in page.text
    assert sum("no picture" in x.get("aria-label", "") for x in page.all("span")) == 3


def test_more_frames_than_pixels_is_no_film(tmp_path: Path) -> None:
    audit = write_fake_audit(tmp_path)
    for one in audit["pictures"]:
        one["frames"] = 10**6
    rewrite(tmp_path, audit)
    assert "The attack at work" not in read(write_audit_page(tmp_path)).text


def test_page_that_cannot_be_written(tmp_path: Path) -> None:
    write_fake_audit(tmp_path)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*report\.html"):
        write_audit_page(tmp_path)
    assert not list(tmp_path.glob(".fedkl-*"))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if (isinstance(value, list))
        else ()
    )
    for key, one in inner:
        yield from leaves(one, (*path, key))


ANYTHING = st.sampled_from(
    [None, True, -1, 0, 3, 1e308, 10**400, "", "x", EVIL, "\ud800", [], [None], {}, {"a": None}]
)


@settings(max_examples=100)
@given(data=st.data())
def test_any_wrong_value_is_shown_or_refused(small: Small, data: st.DataObject) -> None:
    folder, audit = small
    audit = copy.deepcopy(audit)
    path = data.draw(st.sampled_from(list(leaves(audit))))
    place = audit
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = data.draw(ANYTHING)
    rewrite(folder, audit)
    try:
        page = read(write_audit_page(folder))
    except FedKLError:
        return
    assert page.all("script") == [{}]
    assert page.all("img") == []


def test_page_needs_no_torch(tmp_path: Path) -> None:
    write_fake_audit(tmp_path)
    code = (
        "import sys, pathlib; from fedkl.report.audit_page import write_audit_page; "
        f"write_audit_page(pathlib.Path({str(tmp_path)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
