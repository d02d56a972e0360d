"""``fedkl train``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedkl.cli.configure import build_config, with_settings
from fedkl.cli.folders import named
from fedkl.cli.provenance import command_line, versions
from fedkl.cli.settings import PRESETS
from fedkl.cli.show import MEANING, accuracy_table, duration, out, percent, say, watching
from fedkl.errors import number_of

if TYPE_CHECKING:
    from fedkl.data import DataBundle
    from fedkl.federation import RunConfig


@with_settings
def train(
    out_folder: Annotated[
        Path,
        typer.Option(
            "--out", parser=named, metavar="PATH", help="Folder of the run; made if missing."
        ),
    ],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the newest checkpoint, with the settings of the folder."
        ),
    ] = False,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="TOML file of settings; flags win over it.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Settings to start from: {', '.join(PRESETS)}. The file and flags win over it."
        ),
    ] = None,
    *,
    settings: Mapping[str, Any],
) -> None:
    """Train a federation and measure what its keys are worth.

    Writes config.json, metrics.jsonl, summary.json, curves.png, checkpoints/, and the clients'
    own keys/ and clients/, which are private. Ctrl-C leaves a run that --resume continues.

    Examples:

      fedkl train --dataset fashion-mnist --method fedkl --clients 3 --rounds 20 --out runs/kl

      fedkl train --config run.toml --lr 0.1 --workers 2 --out runs/fast

      fedkl train --preset paper --model resnet20 --dataset cifar10 --out runs/paper

      fedkl train --out runs/kl --resume
    """
    base = None
    if resume and (out_folder / "config.json").is_file():
        from fedkl.federation.folder import read_settings

        base = read_settings(out_folder)
    config = build_config(flags=settings, file=config_file, preset=preset, base=base)
    try:
        summary = train_one(config, out_folder, resume=resume)
    except KeyboardInterrupt:
        again = shlex.join(["fedkl", "train", "--out", str(out_folder), "--resume"])
        begun = (out_folder / "config.json").exists()
        say(f"interrupted; continue with: {again}" if begun else "interrupted before it began.")
        raise typer.Exit(130) from None
    _conclude(summary, out_folder)


def train_one(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    bundle: DataBundle | None = None,
    label: str | None = None,
) -> dict[str, Any]:
    """Checks, trains, measures; completes ``summary.json`` and draws ``curves.png``.

    Returns:
        The contents of ``summary.json``, and the lines of ``metrics.jsonl`` as ``validation``.
    """
    from fedkl.federation import run
    from fedkl.federation.preflight import preflight
    from fedkl.files import write_bytes, write_json
    from fedkl.report.curves import run_curves

    bundle = preflight(config, folder, resume=resume, bundle=bundle)
    name = label or f"{config.federation.method} {config.defense.name}"
    with watching(name, config.federation.rounds) as watch:
        result = run(config, folder, resume=resume, bundle=bundle, on_event=watch)
    summary = {**result.to_dict(), "command": command_line(), "versions": versions()}
    write_json(folder / "summary.json", summary)
    if result.validation:
        write_bytes(folder / "curves.png", run_curves(result.validation, title=name))
    return {**summary, "validation": result.validation}


def _conclude(summary: Mapping[str, Any], folder: Path) -> None:
    console = out()
    name = f"{summary['method']} {summary['defense']}"
    title = f"Accuracy on the test set after {number_of(summary['rounds'], 'round')}"
    console.print(accuracy_table(title, [(name, summary["accuracy"])]))
    if summary["accuracy"]["other_client"] is not None:
        print(MEANING)
    best = summary["best_validation"]
    if best:
        print(f"Best on validation: {percent(best['own_key'])} after round {best['round']}.")
    counts = summary["counts"]
    if any(counts.values()):
        print(f"Updates refused: {counts['refused']}, clients dropped out: {counts['dropped']}.")
    files = ["summary.json", "metrics.jsonl", "curves.png", "checkpoints/"]
    there = [name for name in files if (folder / name).exists()]
    print(f"{duration(summary['seconds'])}. In {folder}: {', '.join(there)}")
    secret = [f"{name}/" for name in ("keys", "clients") if _filled(folder / name)]
    if secret:
        print(f"Secret, for the clients alone: {' and '.join(secret)} in {folder}")
    sys.stdout.flush()


def _filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
