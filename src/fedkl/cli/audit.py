"""``fedkl audit``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedkl.cli.configure import build_config, with_settings
from fedkl.cli.folders import AUDIT, check_audit_folder, named
from fedkl.cli.provenance import command_line, versions
from fedkl.cli.settings import ATTACKS, DEFENSES, EFFORTS, STAGES, THREATS
from fedkl.cli.show import err, out, plain, say, table_of
from fedkl.errors import ConfigError

if TYPE_CHECKING:
    from fedkl.audit import AuditConfig, Event

# What an audit trains unless told otherwise: enough for a model that works, in a minute or two.
START: Final = {
    "federation": {"rounds": 5},
    "data": {"samples": 6_000, "channels": 1},
    "evaluation": {"every": 0},
}
DEFENDED: Final = "none,norm,fedbn,channel,pad"
WITHOUT_RUN: Final = "Without --run: settings of the runs that are trained for it"
OWN_FLAGS: Final = ("defense.name", "training.batch_size", "training.local_steps")


@functools.partial(with_settings, without=OWN_FLAGS, panel=WITHOUT_RUN, start=START)
def audit(
    out_folder: Annotated[
        Path,
        typer.Option(
            "--out", parser=named, metavar="PATH", help="Folder for audit.json and the page."
        ),
    ],
    run_folder: Annotated[
        Path | None,
        typer.Option("--run", help="Folder of a finished run; its settings and keys are used."),
    ] = None,
    defenses: Annotated[
        str,
        typer.Option(
            help=f"With commas, of: {', '.join(DEFENSES)}; also joined by +, as in norm+noise."
        ),
    ] = DEFENDED,
    attacks: Annotated[
        str, typer.Option(help=f"With commas, or all, of: {', '.join(ATTACKS)}.")
    ] = "inverting-gradients,shadow-label,replay,replay-relations",
    threats: Annotated[
        str, typer.Option(help=f"With commas, or all, of: {', '.join(THREATS)}.")
    ] = "adaptive",
    stage: Annotated[
        str, typer.Option(help=f"Model the victims start from: {', '.join(STAGES)}.")
    ] = "final",
    images: Annotated[int, typer.Option(help="Victims.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Images per step of an update.")] = 1,
    local_steps: Annotated[int, typer.Option(help="Steps of an update; 1 is a gradient.")] = 1,
    observations: Annotated[
        int, typer.Option(help="Updates under one lock that the attacker pools into one guess.")
    ] = 1,
    aggregated: Annotated[
        int, typer.Option(help="Clients averaged before the server sees them (SecAgg).")
    ] = 1,
    seeds: Annotated[int, typer.Option(help="Federations, each with its own keys.")] = 1,
    candidates: Annotated[
        int, typer.Option(help="Images of a class among which the true one is to be found.")
    ] = 100,
    effort: Annotated[str, typer.Option(help=f"One of: {', '.join(EFFORTS)}.")] = "standard",
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Steps of attacks that search by gradient. Default: as the effort has it.",
            show_default=False,
        ),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            help="Trials (victims times restarts) that a searching attack runs as one batch; fewer "
            "take less memory. Default: the attack's own number.",
            show_default=False,
        ),
    ] = None,
    certificate: Annotated[
        bool,
        typer.Option("--certificate", help="Also count the directions and bits given away."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the audit in the folder.")
    ] = False,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="TOML file of the run's settings.")
    ] = None,
    *,
    settings: Mapping[str, Any],
) -> None:
    """Attack what clients really send, and see what leaks with and without the lock.

    Updates are made by the federation's own client code from test images. The controls always run:
    undefended, the ordinary norm, the keyless private norm, the key holder, and the floor, which is
    the best guess without any gradient. Exit code: 0 holds, 1 leaks, 3 inconclusive.

    Examples:

      fedkl audit --defenses channel --out runs/audit

      fedkl audit --run runs/kl --attacks all --images 100 --out runs/kl-audit

      fedkl audit --model resnet18 --image-size 224 --stage initial --images 1
        --attacks inverting-gradients --iterations 5 --out runs/large

      fedkl audit --batch-size 8 --local-steps 5 --effort quick --out runs/updates
    """
    from fedkl.audit import EXIT_CODES, AuditConfig
    from fedkl.audit.config import CONTROLS

    if run_folder is not None and config_file is not None:
        raise ConfigError("--run takes its settings from the run; leave --config out.")
    check_audit_folder(out_folder, resume=resume)
    base, asked = base_of(run_folder, settings), listed(defenses)
    if not asked:
        raise ConfigError(
            f"--defenses is empty, got {defenses!r}; name one or more of: {', '.join(DEFENSES)}."
        )
    # Controls always run, so a setting of theirs does something in every audit.
    tried = () if run_folder is not None else tuple(dict.fromkeys((*CONTROLS, *asked)))
    config = AuditConfig(
        run=build_config(flags=settings, file=config_file, base=base, defenses=tried),
        defenses=asked if run_folder is None else _with_own(asked, base),
        attacks=listed(attacks, ATTACKS),
        threats=listed(threats, THREATS),
        stage=stage,
        images=images,
        batch_size=batch_size,
        local_steps=local_steps,
        observations=observations,
        aggregated=aggregated,
        seeds=seeds,
        effort=effort,
        iterations=iterations,
        parallel=parallel,
        candidates=candidates,
        certificate=certificate,
    )
    sources = {} if run_folder is None else {config.run.defense.name: run_folder}
    result = _watched(config, out_folder, sources, resume=resume)
    from fedkl.report import write_audit_page

    write_audit_page(out_folder)
    _conclude(result, out_folder)
    raise typer.Exit(EXIT_CODES[result["verdict"]["overall"]])


def _watched(
    config: AuditConfig, folder: Path, sources: Mapping[str, Path], *, resume: bool
) -> dict[str, Any]:
    """The audit, with its progress on show; says how to go on when it is interrupted."""
    from fedkl.audit import run_audit

    # The command that began it: an audit that was interrupted gives the same JSON.
    facts = {"command": command_line(without="--resume"), "versions": versions()}
    try:
        with watching_audit() as watch:
            return run_audit(
                config, folder, sources=sources, resume=resume, facts=facts, listen=watch
            )
    except KeyboardInterrupt:
        again = command_line() + ("" if resume else " --resume")
        begun = (folder / AUDIT).exists()
        say(f"interrupted; continue with: {again}" if begun else "interrupted before it began.")
        raise typer.Exit(130) from None


def base_of(run_folder: Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings to start from: an audit's own, or those of a finished run.

    Raises:
        CheckpointError: The folder holds no finished run, or its settings or summary are damaged.
        ConfigError: Settings were given that the run has already.
    """
    if run_folder is None:
        return dict(START)
    from fedkl.errors import CheckpointError
    from fedkl.federation.folder import read_config, read_summary

    if not (run_folder / "summary.json").is_file():
        raise CheckpointError(
            f"{run_folder} holds no finished run (no summary.json); check the path, or finish it "
            "with: fedkl train --out … --resume."
        )
    given = [path for path in settings if path not in ("workers", "device")]
    if given:
        raise ConfigError(
            f"--run takes its settings from the run, but {', '.join(given)} was given too; leave "
            "one of them out."
        )
    read_summary(run_folder)
    return read_config(run_folder).to_dict()


def _with_own(asked: tuple[str, ...], base: Mapping[str, Any]) -> tuple[str, ...]:
    """The defense of the run that was given, and those asked for that are controls."""
    own, controls = str(base["defense"]["name"]), ("none", "norm", "fedbn")
    unasked = asked == listed(DEFENDED)
    if unasked and own in controls:
        return (own,)  # the others run beside it, and nobody asked for a verdict on them
    strange = [name for name in asked if name not in (*controls, own)]
    if strange and not unasked:
        raise ConfigError(
            f"--run holds a run with defense {own}, but --defenses names {', '.join(strange)}; "
            "audit those without --run, or give their own runs one by one."
        )
    return tuple(dict.fromkeys((*(d for d in asked if d in controls), own)))


def listed(text: str, everything: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names with commas; ``all`` stands for ``everything``, where there is that."""
    if text.strip() == "all" and everything:
        return everything
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


@contextmanager
def watching_audit() -> Iterator[Callable[[Event], None]]:
    """Shows the events of an audit: a bar on a terminal, a line per cell elsewhere."""
    console = err()
    if not console.is_terminal:
        yield lambda event: say(_line(event)) if event.kind in ("cell", "note") else None
        return
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        task = progress.add_task("", total=1, state="reading data")

        def watch(event: Event) -> None:
            if event.kind == "note":
                progress.console.print(f"note: {plain(event.text)}", markup=False)
                return
            state = f"loss {event.loss:.3g}" if event.loss == event.loss else ""
            total = max(1, event.of)
            label = f"{event.kind} {event.text}"
            progress.update(task, completed=event.done, total=total, description=label, state=state)

        yield watch


def _line(event: Event) -> str:
    if event.kind == "note":
        return f"note: {event.text}"
    return f"[{event.done + 1}/{event.of}] {event.text}"


def _conclude(result: Mapping[str, Any], folder: Path) -> None:
    show_audit(result)
    made = [n for n in ("audit.json", "report.html", "pictures/") if (folder / n).exists()]
    print(f"In {folder}: {', '.join(made)}")


def show_audit(result: Mapping[str, Any]) -> None:
    """Prints the table and the verdict of an audit."""
    rows = [
        [
            f"{entry['defense']} ({entry['threat']})",
            entry["attack"],
            str(entry["n"]),
            _interval(entry["advantage"]),
            _percentage(entry["identified"]),
            entry["verdict"] if entry["role"] == "defense" else f"({entry['verdict']})",
        ]
        for entry in result["summary"]
    ]
    columns = ["defense (threat)", "attack", "n", "advantage", "identified", "verdict"]
    out().print(
        table_of(
            "Aligned SSIM beyond the floor, images found among "
            f"{result['config']['candidates']} of a class; 95 % intervals",
            columns,
            rows,
        )
    )
    print("Controls in brackets: the verdict is not about them.")
    for line in result["caveats"]:
        print(plain(f"note: {line}"))
    for line in result["skipped"]:
        print(plain(f"left out: {line['cell']}: {line['reason']}"))
    for line in result["left_out"]:
        print(plain(f"left out: {line['cell']}, victim {line['victim']}: {line['reason']}"))
    for name, found in result["verdict"]["defenses"].items():
        print(plain(f"{name}: {found['verdict']}. {found['reason']}"))


def _interval(value: Mapping[str, float | None]) -> str:
    if value["mean"] is None:
        return "–"
    if value["low"] is None or value["high"] is None:
        return f"{value['mean']:+.3f}"
    return f"{value['mean']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"


def _percentage(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:.0f} % [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"
