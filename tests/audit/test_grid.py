"""The audit from end to end, on digits."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from audithelp import centralized, small_audit, small_run, small_run_with

from fedkl.attacks import InvertingGradients
from fedkl.audit import Event, arsenal, grid, run_audit
from fedkl.errors import ConfigError, DataError
from fedkl.federation import run
from fedkl.report import write_audit_page


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is the grid: a few iterations do."""
    monkeypatch.setattr(
        arsenal, "make_attack", lambda *_, **__: InvertingGradients(iterations=20, restarts=1)
    )


def whole(folder: Path) -> str:
    return (folder / "audit.json").read_text()


def test_killed_anywhere_and_resumed_gives_the_same_json(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    seen: list[Event] = []
    audit = small_audit(threats=("adaptive",))
    reference = run_audit(audit, tmp_path / "a", listen=seen.append)
    cells = sum(event.kind == "cell" for event in seen)
    assert cells == 6  # none, norm, fedbn x 2, channel x 2
    before = whole(tmp_path / "a")
    # Keys come from the operating system: the same audit is the one in the same folder.
    for stop in (2, 5):
        (tmp_path / "a" / "audit.json").unlink()
        for path in sorted((tmp_path / "a" / "cells").iterdir())[stop:]:
            path.unlink()

        def kill(event: Event, stop: int = stop) -> None:
            if event.kind == "attack" and event.done >= 10:
                raise Killed

        with pytest.raises(Killed):
            run_audit(audit, tmp_path / "a", resume=True, listen=kill)
        assert not (tmp_path / "a" / "audit.json").exists()
        again = run_audit(audit, tmp_path / "a", resume=True)
        assert whole(tmp_path / "a") == before
        assert json.loads(before)["summary"] == json.loads(json.dumps(again["summary"]))
    assert reference["verdict"] == json.loads(before)["verdict"]


@pytest.mark.parametrize("spoilt", ["cut", "other form"])
def test_damaged_cell_is_done_again(tmp_path: Path, spoilt: str) -> None:
    audit = small_audit(stage="initial")
    run_audit(audit, tmp_path)
    before = whole(tmp_path)
    cell = min((tmp_path / "cells").iterdir())
    if spoilt == "cut":
        cell.write_bytes(cell.read_bytes()[:-20])
    else:
        cell.write_text('{"rows": [{}]}')
    notes: list[str] = []
    run_audit(
        audit,
        tmp_path,
        resume=True,
        listen=lambda e: notes.append(e.text) if e.kind == "note" else None,
    )
    assert any("damaged" in note for note in notes)
    assert whole(tmp_path) == before


def test_json_has_what_the_page_and_people_need(tmp_path: Path) -> None:
    result = run_audit(
        small_audit(observations=2, seeds=2), tmp_path, facts={"command": "fedkl audit"}
    )
    assert result["controls"] == ["none", "norm", "fedbn", "key-shared", "floor"]
    assert {row["seed"] for row in result["rows"]} == {0, 1}
    assert len(result["rows"]) == 6 * 2 * 4  # cells x seeds x images
    for row in result["rows"]:
        assert row["presentations"] == 2
        assert row["advantage"] == pytest.approx(row["ssim_aligned"] - row["floor_ssim_aligned"])
        assert 0 <= row["label"] < 10
    assert len({(row["image"], row["seed"]) for row in result["rows"]}) == 8
    for entry in result["summary"]:
        assert (entry["n"], entry["images"]) == (2, 8)
    for picture in result["pictures"]:
        for name in ("truth", "floor", "reconstruction", "sprite"):
            assert (tmp_path / picture[name]).is_file()
        assert len(picture["losses"]) == len(picture["ssims"]) == picture["frames"]
    assert result["accuracy"]["channel"]["own_key"] is not None
    parsed = json.loads(whole(tmp_path))
    assert parsed["rows"] == json.loads(json.dumps(result["rows"]))


def test_labels_are_said_to_be_found_only_where_the_update_tells_them(tmp_path: Path) -> None:
    """The pad's classifier is private: its attackers are granted the label."""
    result = run_audit(small_audit(stage="initial", defenses=("pad",), images=1), tmp_path)
    for row in result["rows"]:
        granted = row["defense"] == "pad"
        assert row["labels_granted"] == granted
        assert (row["label_found"] is None) == granted
    for entry in result["summary"]:
        assert (entry["labels_right"]["mean"] is None) == (entry["defense"] == "pad")
    write_audit_page(tmp_path)


@pytest.mark.parametrize("verdict", ["holds", "leaks", "inconclusive"])
def test_what_is_said_of_locks_that_hold_goes_by_the_verdict(verdict: str) -> None:
    nothing = {"mean": 0.0}
    entry = {
        "defense": "channel", "role": "defense", "attack": "dlg", "threat": "adaptive",
        "verdict": verdict, "reason": "as it is", "advantage": nothing, "identified": nothing,
        "floor_identified": nothing,
    }  # fmt: skip
    data: Any = SimpleNamespace(name="digits", num_classes=10)
    result = grid._result(small_audit(), data, {}, {"summary": [entry], "skipped": []}, {})
    assert result["verdict"]["overall"] == verdict
    said = any("channel: this is about outsiders" in line for line in result["caveats"])
    assert said == (verdict == "holds")


def test_finished_run_is_audited_with_its_own_keys(tmp_path: Path) -> None:
    config = small_run(name="channel")
    run(config, tmp_path / "run")
    keys = {p.name: p.read_bytes() for p in (tmp_path / "run" / "keys").iterdir()}
    audit = small_audit(run=config, images=1)
    trained: set[str] = set()
    run_audit(
        audit,
        tmp_path / "audit",
        sources={"channel": tmp_path / "run"},
        listen=lambda e: trained.add(e.text) if e.kind == "train" else None,
    )
    assert trained == {"none", "norm", "fedbn"}
    assert keys == {p.name: p.read_bytes() for p in (tmp_path / "run" / "keys").iterdir()}


def test_folder_of_another_audit_is_refused(tmp_path: Path) -> None:
    audit = small_audit(stage="initial", images=1)
    run_audit(audit, tmp_path)
    with pytest.raises(ConfigError, match="--resume"):
        run_audit(audit, tmp_path)
    with pytest.raises(ConfigError, match="other settings"):
        run_audit(small_audit(stage="initial", images=2), tmp_path, resume=True)


def test_an_audit_goes_on_with_other_workers(tmp_path: Path) -> None:
    """The result does not depend on them."""
    audit = small_audit(stage="initial", images=1)
    run_audit(audit, tmp_path)
    before = json.loads(whole(tmp_path))["rows"]
    other = dataclasses.replace(audit.run, workers=2, checkpoint_every=3)
    run_audit(dataclasses.replace(audit, run=other), tmp_path, resume=True)
    assert json.loads(whole(tmp_path))["rows"] == before
    other = dataclasses.replace(audit.run, seed=1)
    with pytest.raises(ConfigError, match="other settings"):
        run_audit(dataclasses.replace(audit, run=other), tmp_path, resume=True)


def test_resumed_with_another_run_is_refused(tmp_path: Path) -> None:
    """Two runs of the same settings: keys come from the operating system, so the models differ."""
    config = small_run(name="channel")
    for name in ("a", "b"):
        run(config, tmp_path / name)
    audit = small_audit(run=config, images=1, stage="initial")
    out, first = tmp_path / "audit", {"channel": tmp_path / "a"}
    run_audit(audit, out, sources=first)
    before = whole(out)
    with pytest.raises(ConfigError, match=r"a run of channel \(settings .* cells of both") as error:
        run_audit(audit, out, sources={"channel": tmp_path / "b"}, resume=True)
    assert "choose another --out" in str(error.value)
    with pytest.raises(ConfigError, match="this one is of runs of its own"):
        run_audit(audit, out, resume=True)
    assert whole(out) == before
    # The same run in another place is the same run.
    (tmp_path / "a").rename(tmp_path / "moved")
    run_audit(audit, out, sources={"channel": tmp_path / "moved"}, resume=True)
    assert whole(out) == before


def test_audit_of_its_own_runs_is_not_resumed_with_one_given(tmp_path: Path) -> None:
    config = small_run(name="channel")
    audit = small_audit(run=config, images=1, stage="initial")
    run_audit(audit, tmp_path / "audit")
    run(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="an audit of runs of its own, but"):
        run_audit(audit, tmp_path / "audit", sources={"channel": tmp_path / "run"}, resume=True)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"attacks": ("inverting",)}, "inverting-gradients"),
        ({"threats": ("adaptiv",)}, "adaptive"),
        ({"defenses": ("chanel",)}, "channel"),
        ({"stage": "end"}, "final"),
        ({"effort": "much"}, "standard"),
        ({"images": 0}, "images must be at least 1"),
        ({"attacks": ()}, "no attack"),
        ({"defenses": ()}, "no defense"),
        ({"candidates": 1}, "at least 2"),
        ({"certificate": True, "aggregated": 2}, "one client's update, but aggregated is 2"),
        ({"aggregated": 3}, "aggregated is 3, but the federation has 2 client"),
        ({"run": centralized(), "aggregated": 2}, "aggregated is 2, but .* has 1 client"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"parallel": 0}, "parallel must be at least 1"),
        ({"iterations": 5, "attacks": ("peel", "shadow")}, "none of the attacks searches"),
        ({"run": small_run_with("adam"), "local_steps": 2}, "unrolled as SGD"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_audit(**settings)


def test_nothing_is_written_before_all_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"--candidates 36 or fewer"):
        run_audit(small_audit(candidates=5000), tmp_path / "new")
    with pytest.raises(DataError, match="--images 359 or fewer"):
        run_audit(small_audit(images=360), tmp_path / "new")
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ConfigError, match=r"fedkl\[audit\]"):
        run_audit(small_audit(attacks=("dlg", "ggl"), effort="paper"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
