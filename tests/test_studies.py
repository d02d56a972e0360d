"""The studies' plans are audits that can be run, and their tables say what the audits said."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

STUDIES = Path(__file__).resolve().parent.parent / "studies"


@pytest.fixture(autouse=True)
def studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    for name in ("cells", "leakage", "leakagetables", "controls", "intruders", "replayers"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def summary(defense: str, threat: str, role: str, verdict: str) -> dict[str, Any]:
    from fedkl.audit.verdicts import MEANS, RATES

    mean = {"mean": 0.25, "low": 0.125, "high": 0.5}
    return {
        "attack": "dlg", "defense": defense, "threat": threat, "n": 20, "role": role,
        "verdict": verdict, **dict.fromkeys((*MEANS, *RATES), mean),
    }  # fmt: skip


def test_every_planned_audit_is_one(tmp_path: Path) -> None:
    import leakage

    from fedkl.audit import AuditConfig

    for plan in leakage.AUDITS.values():
        for arm, threats in plan.arms.items():
            run = leakage.settings_of(plan.model, arm, tmp_path)
            audit = AuditConfig(
                run=run,
                defenses=(run.defense.name,),
                attacks=plan.attacks,
                threats=threats,
                stage=plan.stage,
                effort=plan.effort,
            )
            assert audit.judged == (leakage.ARMS[arm]["name"],)
            assert "adaptive" in threats  # else the cells of fedbn could not be shared


def test_controls_that_audits_share_appear_once_and_verdicts_as_given() -> None:
    import leakage

    def audit(arm: str, verdict: str) -> dict[str, Any]:
        return {
            "arm": arm,
            "commit": "abc",
            "summary": [
                summary("none", "open", "control", "leaks"),
                summary("channel", "adaptive", "defense", verdict),
            ],
            "attacks": {"a": "DLG(iterations=300)"},
            "accuracy": {"none": None, "channel": None},
            "verdict": {"defenses": {"channel": {"verdict": verdict, "reason": f"for {arm}."}}},
            "seconds": 60.0,
        }

    arms = {"channel": audit("channel", "leaks"), "paper-sigmoid": audit("paper-sigmoid", "holds")}
    document = {"command": "c", "commit": "0", "date": "d", "audits": {"lenet-initial": arms}}
    rows = leakage.rows_of(document, "lenet-initial")
    assert [row["arm"] for row in rows] == ["none", "channel", "paper-sigmoid"]
    text = leakage.markdown(document)
    assert "| none | open |" in text
    assert "(leaks) |" in text
    assert "**paper-sigmoid** (channel): holds. for paper-sigmoid." in text
    assert "2 minutes" in text


def test_a_control_is_missed_below_its_target() -> None:
    import controls

    good = {"ssim": [0.95] * 4 + [0.1], "labels right": 1.0}
    assert controls.judged("dlg photos", good)["met"] is True
    assert controls.judged("dlg photos", {**good, "ssim": [0.95] * 3 + [0.1] * 2})["met"] is False
    assert controls.judged("grnn fashion", good)["met"] is False
    floor = {**good, "ssim_aligned": [0.6] * 5, "floor_aligned": [0.5] * 5}
    assert controls.judged("ggl fashion trained", floor)["met"] is True
    assert controls.judged("ggl fashion trained", {**floor, "labels right": 0.8})["met"] is False


def test_a_failed_cell_costs_no_other_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cells

    (tmp_path / "inverse.py").write_text("def work(name, cell):\n    return {'of': 1 / cell}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import inverse  # type: ignore[import-not-found]

    jobs, costs = {"bad": 0, "good": 4}, {"bad": 2.0, "good": 1.0}  # the bad one goes first
    with pytest.raises(ZeroDivisionError):
        cells.run_cells(jobs, inverse.work, tmp_path / "cells", processes=1, costs=costs)
    assert "bad failed, the others go on: ZeroDivisionError" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["good.json"]
    again = cells.run_cells({"good": 4}, inverse.work, tmp_path / "cells", processes=1, costs=costs)
    assert again == {"good": {"of": 0.25}}


def test_exchanged_victims_keep_their_class_and_nobody_keeps_what_was_their_own() -> None:
    import torch
    from replayers import ReplayBench

    bench = ReplayBench.__new__(ReplayBench)
    bench.labels = torch.arange(200) % 10
    bench.seen = torch.arange(200.0)[:, None]
    made = bench.shuffled().flatten().long()
    assert sorted(made.tolist()) == list(range(200))
    assert bench.labels[made].equal(bench.labels)
    assert not bool((made == torch.arange(200)).any())
