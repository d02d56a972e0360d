"""``fedkl inspect``: a model, a key file or a run. Nothing secret is ever shown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedkl.cli.keys import VARIABLE, AskPassphrase, PassphraseFile, passphrase_from
from fedkl.cli.settings import DEFENSES, MODELS
from fedkl.cli.show import COLUMNS, accuracy_table, out, percent, table_of
from fedkl.errors import ConfigError, KeyFileError

if TYPE_CHECKING:
    from torch import nn

_MODEL = "Models"
_KEY = "Key files"


def inspect(
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="[KEYFILE|RUN_DIR]", help="A key file or a run.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(MODELS)}, any torchvision classification model, or "
            "package.module:factory.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    image_size: Annotated[int, typer.Option(rich_help_panel=_MODEL)] = 32,
    channels: Annotated[int, typer.Option(rich_help_panel=_MODEL)] = 3,
    num_classes: Annotated[int, typer.Option(rich_help_panel=_MODEL)] = 10,
    defense: Annotated[
        str,
        typer.Option(help=f"One of: {', '.join(DEFENSES)}.", rich_help_panel=_MODEL),
    ] = "channel",
    layers: Annotated[
        str,
        typer.Option(
            help="first, all, a module's name, or a regular expression that matches whole names.",
            rich_help_panel=_MODEL,
        ),
    ] = "all",
    norm: Annotated[
        str, typer.Option(help="Norm inserted where there is none.", rich_help_panel=_MODEL)
    ] = "batch",
    passphrase: AskPassphrase = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Show what can be locked in a model, what a key file is, or what a run has come to.

    Examples:

      fedkl inspect --model resnet18

      fedkl inspect --model lenet --layers first

      fedkl inspect alice.key

      fedkl inspect runs/kl
    """
    if (target is None) == (model is None):
        raise ConfigError("inspect one thing: a key file, a run folder, or --model NAME.")
    if model is not None:
        sizes = {"num_classes": num_classes, "channels": channels, "image_size": image_size}
        _show_model(model, sizes, {"name": defense, "layers": layers, "norm": norm})
    elif target is not None and target.is_dir():
        _show_run(target)
    elif target is not None:
        _show_key(target, passphrase_from(passphrase, passphrase_file))


def _show_model(name: str, sizes: Mapping[str, int], settings: Mapping[str, str]) -> None:
    from fedkl.locking import lockable
    from fedkl.models import build
    from fedkl.rng import derive

    model = build(
        name,
        num_classes=sizes["num_classes"],
        channels=sizes["channels"],
        image_size=sizes["image_size"],
        generator=derive(0, "model"),
    )
    locks, inserted = _locks(model, sizes, settings)
    rows = []
    for row in lockable(model):
        place = "locks" if row.name in locks else "locks, inserts a norm"
        lock = place if row.name in locks or row.name in inserted else ""
        share = f"{100 * row.added_share:.1f} %" if row.lockable else ""
        can = "yes: " if row.lockable else "no: "
        rows.append(
            [row.name or "(the model)", row.module, row.kind, can + row.reason, share, lock]
        )
    asked = f"{settings['name']}, layers {settings['layers']}"
    columns = ["name", "module", "kind", "lockable?", "adds", asked]
    out().print(table_of(f"{name}: what can carry a lock", columns, rows))
    print(f"{asked}: {len(locks) + len(inserted)} site(s).")
    print("adds: parameters of a lock with a key of 1024, over those of the model.")


def _locks(
    model: nn.Module, sizes: Mapping[str, int], settings: Mapping[str, str]
) -> tuple[set[str], set[str]]:
    """Names of the norms that would be locked, and of the layers that would get one."""
    import torch

    from fedkl.defenses import DefenseConfig, make_defense
    from fedkl.key import Key
    from fedkl.locking import is_locked, lock_spec
    from fedkl.rng import derive

    defense = make_defense(DefenseConfig(**settings))  # type: ignore[arg-type]
    shape = (4, sizes["channels"], sizes["image_size"], sizes["image_size"])
    example = torch.rand(shape, generator=derive(0, "example"))
    prepared = defense.prepare(model, Key.generate() if defense.keyed else None, example)
    sites = lock_spec(prepared).sites if is_locked(prepared) else ()
    there = {site.name for site in sites if not site.inserted}
    return there, {site.name.rpartition(".")[0] for site in sites if site.inserted}


def _show_key(path: Path, passphrase: str | None) -> None:
    from fedkl.key import Key

    header = _header(path)
    encrypted = header.get("encryption") is not None
    if passphrase is not None and not encrypted and header.get("format") == "fedkl-key":
        raise KeyFileError(f"{path} is not encrypted; leave the passphrase out.")
    if passphrase is None and encrypted:
        passphrase = os.environ.get(VARIABLE)
    fingerprint, kind, state = "", "", ""
    if encrypted and passphrase is None:
        # Unverified, and a file may come from anybody: only what looks right is shown.
        fingerprint = str(header.get("fingerprint"))
        kind = str(header.get("kind"))
        if not re.fullmatch("[0-9a-f]{16}", fingerprint) or kind not in ("seed", "vector"):
            raise KeyFileError(f"{path} is damaged or edited: restore it from a copy.")
        state = "yes; give --passphrase to see whether it opens"
    else:
        key = Key.load(path, passphrase=passphrase)
        fingerprint, kind = key.fingerprint, key.kind
        state = "yes, and it opens with this passphrase" if encrypted else "no"
    kinds = {"seed": "seed (32 random bytes)", "vector": "vector (imported)"}
    rows = [["fingerprint", fingerprint], ["kind", kinds[kind]], ["encrypted", state]]
    out().print(table_of(str(path), ["key", ""], rows))


def _header(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(8 * 2**20))
    except OSError as error:
        raise KeyFileError(
            f"{path} cannot be read: {error.strerror}. Give a key file, a run folder or --model."
        ) from None
    except (ValueError, RecursionError):
        return {}  # Key.load says what is wrong with it
    return document if isinstance(document, dict) else {}


def _show_run(folder: Path) -> None:
    from fedkl.errors import CheckpointError
    from fedkl.federation.folder import any_summary, is_accuracy, read_config, rounds_done
    from fedkl.federation.logbook import read_lines

    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds no run (no config.json); check the path.")
    config = read_config(folder)
    summary = any_summary(folder) if (folder / "summary.json").exists() else None
    rounds = config.federation.rounds
    if summary and not summary["rounds"] == rounds == rounds_done(folder, summary):
        summary = None  # of an earlier end, before the run was asked for more rounds
    console = out()
    rows = []
    for section, values in config.to_dict().items():
        inner = values.items() if isinstance(values, dict) else [("", values)]
        given = [f"{n} = {v}".removeprefix(" = ") for n, v in inner if v is not None]
        rows.append([section, ", ".join(given)])
    console.print(table_of(str(folder), ["section", "settings"], rows))
    name = f"{config.federation.method} {config.defense.name}"
    known = read_lines(folder / "metrics.jsonl")
    lines = [line for line in known if is_accuracy(line.get("accuracy"))]
    if lines:
        last = lines[-1]
        figures = [f"{COLUMNS[n]} {percent(last['accuracy'].get(n))}" for n in COLUMNS]
        print(f"Validation after round {last['round']}: {', '.join(figures)}")
    if summary is None:
        print(f"Not finished; continue with: fedkl train --out {folder} --resume")
        return
    title = f"Accuracy on the test set after {summary['rounds']} rounds"
    console.print(accuracy_table(title, [(name, summary["accuracy"])]))
