"""``fedkl audit --run`` of a run that is a control itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_support import Call

from fedkl.audit import AuditConfig
from fedkl.errors import ConfigError

DIGITS = ["--dataset", "digits", "--image-size", "16", "--channels", "1", "--samples", "60"]


@pytest.mark.parametrize("asked, judged", [(None, ("norm",)), ("none,norm", ("none", "norm"))])
def test_run_of_a_control_is_judged_alone(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, judged: object
) -> None:
    """The undefended network leaks, which decided the exit code."""
    seen: list[AuditConfig] = []

    def look(config: AuditConfig, *_: object, **__: object) -> None:
        seen.append(config)
        raise ConfigError("seen")

    monkeypatch.setattr("fedkl.audit.run_audit", look)
    run = str(tmp_path / "run")
    assert call("train", *DIGITS, "--rounds", "1", "--defense", "norm", "--out", run).code == 0
    more = () if asked is None else ("--defenses", asked)
    call("audit", "--run", run, "--out", str(tmp_path / "new"), *more)
    assert [config.judged for config in seen] == [judged]
