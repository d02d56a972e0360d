"""Where an audit's federations come from, and whether a folder belongs to this audit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fedkl.audit.config import AuditConfig
from fedkl.errors import CheckpointError, ConfigError
from fedkl.federation import RunConfig
from fedkl.federation.checkpoint import Checkpoints
from fedkl.federation.folder import read_config
from fedkl.federation.remains import check_remains
from fedkl.files import make_folder, read_json, write_json

SETTINGS: Final = "audit-config.json"
FORMAT, VERSION = "fedkl-audit-config", 1
# The result of a run does not depend on these.
INDIFFERENT: Final = ("workers", "device", "checkpoint_every")


def federations(
    audit: AuditConfig, folder: Path, given: Mapping[str, Path]
) -> Iterator[tuple[str, int, RunConfig, Path]]:
    """(defense, seed, settings, run folder): those that were given, or ones of the audit's own."""
    for seed in range(audit.seeds):
        for defense in audit.grid:
            if seed == 0 and defense in given:
                yield defense, seed, read_config(given[defense]), given[defense]
            else:
                place = folder / "runs" / f"{defense}-seed{seed}"
                yield defense, seed, audit.defended(defense, seed), place


def identity(run: Path) -> dict[str, str]:
    """What a finished run is, wherever it lies: digests of its settings and of its last model.

    Raises:
        CheckpointError: It has no whole checkpoint, no settings, or has lost a private state.
        KeyFileError: A client's key is not the one its lock was trained with.
    """
    check_remains(run, read_config(run))
    latest, _ = Checkpoints(run / "checkpoints").latest()
    if latest is None:
        raise CheckpointError(
            f"there is no checkpoint in {run}; give the folder of a finished run, or finish it "
            "with: fedkl train --out … --resume."
        )
    found = read_json(run / "config.json")
    kept = {n: v for n, v in found.items() if n not in INDIFFERENT}
    settings = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return {
        "config": hashlib.sha256(settings.encode()).hexdigest(),
        "round": str(latest.round),
        "checkpoint": _digest(latest.shared),
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        found.update(f"{name}/{value.dtype}/{tuple(value.shape)}/".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def claim(audit: AuditConfig, folder: Path, given: Mapping[str, Path], resume: bool) -> None:
    """Makes ``folder`` that of this audit of these runs, or finds that it is.

    Raises:
        ConfigError: It holds another audit, one of other runs, or one and ``resume`` is off.
        CheckpointError: A run that was given has no checkpoint, or the settings in ``folder`` are
            damaged or of another version.
    """
    runs = {defense: identity(place) for defense, place in given.items()}
    wanted = {**_lists(audit.to_dict()), "sources": runs}
    path = folder / SETTINGS
    if not path.exists():
        make_folder(folder)
        write_json(path, {"format": FORMAT, "version": VERSION, **wanted})
        return
    before = read_json(path)
    if not resume:
        raise ConfigError(
            f"{folder} holds an audit already; add --resume to go on with it, or choose "
            "another --out."
        )
    before = _of_this_version(before, path)
    known = before.pop("sources", {}) if isinstance(before, dict) else {}
    if known != runs:
        raise ConfigError(
            f"{folder} holds an audit of {_said(known)}, but this one is of {_said(runs)}: cells "
            "of both would be mixed. Give --run as it was when the audit began, with the run as it "
            "was then, or choose another --out."
        )
    if _lasting(before) != _lasting(_lists(audit.to_dict())):
        raise ConfigError(
            f"{folder} holds an audit with other settings; repeat its command, or choose "
            "another --out."
        )


def _of_this_version(found: Any, path: Path) -> Any:
    """The settings of an audit without format and version, which the first of them did not have.

    Raises:
        CheckpointError: They are others than ours.
    """
    if not isinstance(found, dict):
        return found
    settings = dict(found)
    form, version = settings.pop("format", FORMAT), settings.pop("version", VERSION)
    if form != FORMAT:
        raise CheckpointError(
            f"{path} holds no settings of an audit: its format is {form!r}, expected {FORMAT!r}. "
            "Restore it from a copy, or choose another --out."
        )
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"{path} is of version {version!r}, expected {VERSION}. Go on with the fedkl that "
            "began this audit, or choose another --out."
        )
    return settings


def _lasting(settings: Any) -> Any:
    """Those of an audit without what its result does not depend on."""
    if not isinstance(settings, Mapping) or not isinstance(settings.get("run"), Mapping):
        return settings
    kept = {n: v for n, v in settings["run"].items() if n not in INDIFFERENT}
    return {**settings, "run": kept}


def _said(runs: Mapping[str, Any]) -> str:
    """Runs in words: their settings and models by the beginning of the digests."""
    if not isinstance(runs, Mapping) or not runs:
        return "runs of its own"
    return ", ".join(
        f"a run of {defense} (settings {str(run.get('config'))[:8]}, round {run.get('round')}, "
        f"model {str(run.get('checkpoint'))[:8]})"
        for defense, run in runs.items()
        if isinstance(run, Mapping)
    )


def _lists(value: Any) -> Any:
    """As JSON gives it back: lists in place of tuples."""
    if isinstance(value, Mapping):
        return {name: _lists(item) for name, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
