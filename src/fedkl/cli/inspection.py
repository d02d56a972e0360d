"""``fedkl inspect``: a model, a key file or a run. Nothing secret is ever shown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedkl.cli.keys import VARIABLE, AskPassphrase, PassphraseFile, passphrase_from
from fedkl.cli.settings import DEFENSES, MODELS
from fedkl.cli.show import COLUMNS, accuracy_table, out, percent, table_of
from fedkl.errors import ConfigError, KeyFileError, number_of

if TYPE_CHECKING:
    from torch import Tensor, nn

_MODEL = "Models"
_KEY = "Key files"
SIZES: Final = {"image_size": 32, "channels": 3, "num_classes": 10}
MEETING: Final = 20
LOCK: Final = {"defense": "channel", "layers": "all", "norm": "batch"}


def _of_model(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=_MODEL, show_default=False)


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
    image_size: Annotated[int | None, _of_model("Default: 32.")] = None,
    channels: Annotated[int | None, _of_model("Default: 3.")] = None,
    num_classes: Annotated[int | None, _of_model("Default: 10.")] = None,
    defense: Annotated[
        str | None, _of_model(f"One of: {', '.join(DEFENSES)}. Default: channel.")
    ] = None,
    layers: Annotated[
        str | None,
        _of_model(
            "first, all, a module's name, or a regular expression that matches whole names. "
            "Default: all."
        ),
    ] = None,
    behind: Annotated[
        str | None,
        _of_model("Module behind which the first lock stands; of --layers those that run later."),
    ] = None,
    norm: Annotated[
        str | None, _of_model("Norm inserted where there is none. Default: batch.")
    ] = None,
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
    sizes = _given(image_size=image_size, channels=channels, num_classes=num_classes)
    settings = _given(defense=defense, layers=layers, behind=behind, norm=norm)
    words = _given(passphrase=passphrase or None, passphrase_file=passphrase_file)
    if model is not None:
        _refuse(words, "key files")
        _show_model(model, SIZES | sizes, LOCK | settings)
        return
    _refuse(sizes | settings, "--model")
    assert target is not None
    if target.is_dir():
        _refuse(words, "key files")
        _show_run(target)
    else:
        _show_key(target, passphrase_from(passphrase, passphrase_file))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(given: Mapping[str, Any], what: str) -> None:
    """Raises where options were given that do nothing, as they are for ``what``."""
    if given:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"{flags} {'are' if len(given) > 1 else 'is'} for {what} and would do nothing here; "
            "leave that out."
        )


def _show_model(name: str, sizes: Mapping[str, int], settings: Mapping[str, str]) -> None:
    from fedkl.locking import lockable, meeting_points
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
    listed = {row[0] for row in rows}
    for module in sorted(inserted - listed - {""}):
        kind, how = type(model.get_submodule(module)).__name__, "yes: a norm is inserted behind"
        rows.append([module, kind, "module", how, "", "locks, inserts a norm"])
    asked = f"{settings['defense']}, layers {settings['layers']}"
    asked += f", behind {settings['behind']}" if "behind" in settings else ""
    columns = ["name", "module", "kind", "lockable?", "adds", asked]
    out().print(table_of(f"{name}: what can carry a lock", columns, rows))
    print(f"{asked}: {len(locks) + len(inserted)} site(s).")
    print("adds: parameters of a lock with a key of 1024, over those of the model.")
    meeting = meeting_points(model, _example(sizes))
    # Activations and the like say nothing that the layer before them does not.
    meeting = [n for n in meeting if next(model.get_submodule(n).parameters(), None) is not None]
    more = f" and {len(meeting) - MEETING} more" if len(meeting) > MEETING else ""
    places = ", ".join(meeting[:MEETING]) or "no module"
    print(f"nothing goes around a lock behind (--behind): {places}{more}.")


def _locks(
    model: nn.Module, sizes: Mapping[str, int], settings: Mapping[str, str]
) -> tuple[set[str], set[str]]:
    """Names of the norms that would be locked, and of the layers that would get one."""
    from fedkl.defenses import DefenseConfig, make_defense
    from fedkl.key import Key
    from fedkl.locking import is_locked, lock_spec

    asked = DefenseConfig(
        name=settings["defense"],
        layers=settings["layers"],
        behind=settings.get("behind"),
        norm=settings["norm"],
    )
    defense = make_defense(asked)
    key = Key.generate() if defense.keyed else None
    prepared = defense.prepare(model, key, _example(sizes))
    sites = lock_spec(prepared).sites if is_locked(prepared) else ()
    there = {site.name for site in sites if not site.inserted}
    return there, {site.name.rpartition(".")[0] for site in sites if site.inserted}


def _example(sizes: Mapping[str, int]) -> Tensor:
    import torch

    from fedkl.rng import derive

    shape = (4, sizes["channels"], sizes["image_size"], sizes["image_size"])
    return torch.rand(shape, generator=derive(0, "example"))


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
    title = f"Accuracy on the test set after {number_of(summary['rounds'], 'round')}"
    console.print(accuracy_table(title, [(name, summary["accuracy"])]))
