"""A run folder belongs to one process at a time, and never to two runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fedkl.errors import CheckpointError, OutputError, number_of
from fedkl.federation.checkpoint import Checkpoints
from fedkl.federation.config import RunConfig, config_from
from fedkl.files import make_folder, read_json

try:
    import fcntl
except ImportError:  # Windows has no flock; two runs in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]


def check_folder(folder: Path, *, resume: bool) -> None:
    """Raises where :func:`claimed` would, as far as that can be told without writing anything.

    Raises:
        OutputError: ``folder`` cannot be written, or it holds a run and ``resume`` is off.
        CheckpointError: ``resume`` is on and there is no run.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise OutputError(f"cannot write {folder}: {there} is not a folder; choose another --out.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {folder}: {there} is read-only; choose another --out.")
    path = folder / "config.json"
    if resume and not path.exists():
        raise CheckpointError(
            f"there is no run to resume in {folder} (no config.json); check --out, or start one "
            "without --resume."
        )
    if not resume and path.exists():
        raise OutputError(
            f"{folder} already holds a run; continue it with --resume or choose another --out."
        )
    rest = [p for pattern in PARTS for p in folder.glob(pattern)]
    if not resume and rest:
        raise OutputError(
            f"{folder} holds what is left of a run ({rest[0].relative_to(folder)}), but no "
            "config.json; restore that from a copy and --resume, or choose another --out."
        )


FIGURES: Final = (
    "own_key",
    "wrong_key",
    "wrong_key_p95",
    "other_client",
    "outsider",
    "no_lock",
)
"""Entries of an accuracy that are one number, or null where the thing does not apply."""


def read_config(folder: Path) -> RunConfig:
    """The settings of the run in ``folder``.

    Raises:
        CheckpointError: There is no config.json, or it is not JSON.
        ConfigError: It is not a run's configuration.
    """
    path = folder / "config.json"
    return config_from(read_json(path), source=str(path))


def read_settings(folder: Path) -> dict[str, Any]:
    """The contents of config.json in ``folder``, not looked at beyond being a run's at all.

    Raises:
        CheckpointError: It is missing or damaged, or is something else.
    """
    path = folder / "config.json"
    found = read_json(path)
    if not isinstance(found, dict) or not found:
        raise CheckpointError(
            f"{path} is not a run's configuration: expected a table of settings, got "
            f"{found!r:.60}. Restore it from a copy, or start again in another folder."
        )
    return found


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of the finished run in ``folder``; its rounds and accuracy are what they should.

    Raises:
        CheckpointError: It is missing, damaged, no summary, or not of the run's last round.
        ConfigError: The run's config.json is no configuration.
    """
    found = any_summary(folder)
    wanted = read_config(folder).federation.rounds
    done = rounds_done(folder, found)
    if not found["rounds"] == wanted == done:
        raise CheckpointError(
            f"{folder} is not finished: {done} of {number_of(wanted, 'round')} done, and "
            f"summary.json is of {found['rounds']}; continue with: fedkl train --out {folder} "
            "--resume"
        )
    return found


def any_summary(folder: Path) -> dict[str, Any]:
    """As :func:`read_summary`, but it may be of fewer rounds than the run was then asked for.

    Raises:
        CheckpointError: It is missing, damaged, or no summary.
    """
    path = folder / "summary.json"
    found = read_json(path)
    whole = isinstance(found, dict) and type(found.get("rounds")) is int
    if not whole or not is_accuracy(found.get("accuracy")):
        raise CheckpointError(
            f"{path} is not a run's summary: expected a table with rounds and accuracy. It was "
            f"edited or is something else; write it again with: fedkl train --out {folder} "
            "--resume."
        )
    return dict(found)


def rounds_done(folder: Path, summary: Mapping[str, Any]) -> int:
    """The round of the newest checkpoint that can be used; without one, that of the summary.

    Raises:
        CheckpointError: There are checkpoints and all are damaged.
    """
    latest, _ = Checkpoints(folder / "checkpoints").latest()
    return int(summary["rounds"]) if latest is None else latest.round


def is_accuracy(value: object) -> bool:
    """Whether ``value`` is what ``Accuracy.to_dict`` gives, as far as it is shown."""
    if not isinstance(value, dict):
        return False
    figures = [value.get(name) for name in FIGURES]
    return figures[0] is not None and all(type(f) in (int, float, type(None)) for f in figures)


PARTS: Final = ("summary.json", "metrics.jsonl", "checkpoints/round-*.json", "clients/*/round-*")
"""What a run writes as it goes on. Keys are not among it: they may be there before it starts."""


@contextmanager
def claimed(folder: Path, *, resume: bool) -> Iterator[dict[str, Any] | None]:
    """Holds ``folder`` for this process; yields the configuration of the run found in it.

    The claim ends with the process, however it ends.

    Raises:
        OutputError: The folder cannot be written, another process is using it, or it holds a run
            and ``resume`` is off.
        CheckpointError: ``resume`` is on and there is no run, or its configuration is damaged.
    """
    check_folder(folder, resume=resume)
    make_folder(folder)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _claim(handle, folder)
        yield read_settings(folder) if resume else None
    finally:
        os.close(handle)


def _claim(handle: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        # A record lock, not flock: forked workers do not inherit it and cannot outlive it.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputError(
            f"another process is using {folder}; wait for it, or choose another --out."
        ) from error
