"""The settings of an audit on disk: their version, and files of before there was one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from audithelp import small_audit

from fedkl.audit.sources import SETTINGS, claim
from fedkl.errors import CheckpointError, ConfigError


def rewritten(folder: Path, **changes: Any) -> str:
    """The contents of the settings once entries were changed; None takes one out."""
    path = folder / SETTINGS
    found = {n: v for n, v in json.loads(path.read_text()).items() if n not in changes}
    found |= {n: v for n, v in changes.items() if v is not None}
    path.write_text(json.dumps(found))
    return path.read_text()


def test_settings_have_a_version_and_those_without_are_still_read(tmp_path: Path) -> None:
    audit = small_audit()
    claim(audit, tmp_path, {}, resume=False)
    found = json.loads((tmp_path / SETTINGS).read_text())
    assert (found["format"], found["version"]) == ("fedkl-audit-config", 1)
    claim(audit, tmp_path, {}, resume=True)
    before = rewritten(tmp_path, format=None, version=None)
    claim(audit, tmp_path, {}, resume=True)
    assert (tmp_path / SETTINGS).read_text() == before
    with pytest.raises(ConfigError, match="other settings"):
        claim(small_audit(images=3), tmp_path, {}, resume=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 2}, r"version 2, expected 1.*--out"),
        ({"version": "1"}, "version '1', expected 1"),
        ({"version": True}, "version True, expected 1"),
        ({"format": "fedkl-audit"}, "its format is 'fedkl-audit', expected 'fedkl-audit-config'"),
        ({"version": 2, "later": "settings"}, "version 2"),
    ],
)
def test_settings_of_another_version_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    claim(small_audit(), tmp_path, {}, resume=False)
    before = rewritten(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        claim(small_audit(), tmp_path, {}, resume=True)
    with pytest.raises(ConfigError, match="--resume"):
        claim(small_audit(), tmp_path, {}, resume=False)
    assert (tmp_path / SETTINGS).read_text() == before
