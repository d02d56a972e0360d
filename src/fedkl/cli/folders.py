"""Where a command writes: no folder by accident, and none of somebody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import typer

from fedkl.errors import CheckpointError, ConfigError, OutputError

AUDIT: Final = "audit-config.json"  # what makes a folder one of an audit


def named(text: str) -> Path:
    """The path ``text``; "" would silently be the folder that the command is typed in.

    Raises:
        BadParameter: ``text`` is empty, as an unset variable of a shell is.
    """
    if not text.strip():
        raise typer.BadParameter("got an empty path; name one (. is the present folder)")
    return Path(text)


def check_apart(folder: Path, what: str) -> None:
    """Raises when ``folder`` is a run's own, where ``what`` would be mixed with its files.

    Raises:
        OutputError: It is.
    """
    if (folder / "config.json").exists():
        raise OutputError(
            f"{folder} holds a run, and {what} in it would mix the files of both; choose another "
            "--out."
        )


def check_audit_folder(folder: Path, *, resume: bool) -> None:
    """Raises unless ``folder`` can take an audit, or has the one to go on with.

    Raises:
        OutputError: It holds a run.
        ConfigError: It holds an audit and ``resume`` is off.
        CheckpointError: ``resume`` is on and there is no audit.
    """
    check_apart(folder, "an audit")
    there = (folder / AUDIT).exists()
    if resume and not there:
        raise CheckpointError(
            f"there is no audit to resume in {folder} (no {AUDIT}); check --out, or start one "
            "without --resume."
        )
    if there and not resume:
        raise ConfigError(
            f"{folder} holds an audit already; add --resume to go on with it, or choose "
            "another --out."
        )


def check_update_folder(folder: Path) -> None:
    """Raises where the audit of an update would be mixed with something else.

    Raises:
        OutputError: It is no folder, or it holds a run, an audit or another update's.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is not a folder; choose another --out.")
    check_apart(folder, "the audit of an update")
    if (folder / AUDIT).exists():
        raise OutputError(
            f"{folder} holds an audit, and that of an update in it would mix the files of both; "
            "choose another --out."
        )
    if (folder / "update.json").exists():
        raise OutputError(
            f"{folder} holds the audit of an update already (update.json), which would be "
            "overwritten; choose another --out."
        )
