"""``fedkl demo``: the same network with and without a lock, on real images, in minutes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedkl.cli.audit import show_audit, watching_audit
from fedkl.cli.configure import build_config
from fedkl.cli.folders import named
from fedkl.cli.provenance import command_line, versions
from fedkl.cli.show import MEANING, accuracy_table, out, percent, say
from fedkl.cli.train import train_one
from fedkl.errors import DataNotFoundError, number_of

if TYPE_CHECKING:
    from fedkl.data import DataBundle
    from fedkl.federation import RunConfig


@dataclass(frozen=True)
class Arm:
    """One row of the demo. ``lr`` was chosen on validation images."""

    method: str
    defense: str
    lr: float
    meaning: str


DEMO_ARMS: Final[Mapping[str, Arm]] = {
    "centralized": Arm("centralized", "none", 0.03, "all images in one place, no federation"),
    "fedavg": Arm("fedavg", "none", 0.03, "plain federated averaging; anyone can use the model"),
    "fedavg+norm": Arm("fedavg", "norm", 0.05, "same network with an ordinary shared norm"),
    "fedavg+fedbn": Arm("fedavg", "fedbn", 0.05, "that norm private to each client, no key"),
    "fedavg+channel": Arm("fedavg", "channel", 0.05, "that norm locked as the paper does it"),
    "fedavg+pad": Arm("fedavg", "pad", 0.05, "a lock per position, first and last layer private"),
}
ROUNDS: Final = 10
SAMPLES: Final = 15_000  # images per client
# Where the data set is missing: as many passes as make up for its few images.
SMALL: Final = {"data.dataset": "digits", "data.samples": None, "training.local_epochs": 10}
QUICK_ROUNDS, QUICK_SAMPLES = 3, 1_000
VICTIMS, QUICK_VICTIMS = 40, 20


def demo(
    out_folder: Annotated[
        Path,
        typer.Option(
            "--out", parser=named, metavar="PATH", help="Folder for the runs and the report."
        ),
    ],
    rounds: Annotated[
        int | None,
        typer.Option(help=f"Rounds of every run. Default: {ROUNDS}.", show_default=False),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help=f"{QUICK_ROUNDS} rounds, {QUICK_SAMPLES} images a client."),
    ] = False,
    dataset: Annotated[
        str, typer.Option(help="Data set; digits if it is not there.")
    ] = "fashion-mnist",
    data_root: Annotated[
        str | None, typer.Option(help="Folder of the data set's files.", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
    seed: Annotated[int, typer.Option(help="Of everything but the keys.")] = 0,
) -> None:
    """Train LeNet in six ways, then attack what its clients send. At most 10 minutes on 2 cores.

    Writes a folder per run, curves.png, report.html and the audit's own page audit/report.html.
    Typed again, it goes on where it ended.

    Examples:

      fedkl demo --out runs/demo

      fedkl demo --quick --out runs/quick
    """
    if rounds is None:
        rounds = QUICK_ROUNDS if quick else ROUNDS
    samples = QUICK_SAMPLES if quick else SAMPLES
    common = {
        "data.dataset": dataset,
        "data.samples": samples,
        "data.root": data_root,
        "data.channels": 1,
        "training.schedule": "cosine",
        "federation.rounds": rounds,
        "federation.clients": 3,
        "evaluation.every": max(1, rounds // 4),
        "evaluation.images": 1_000,
        "workers": workers,
        "seed": seed,
    }
    configs = _configs(common)
    from fedkl.federation.folder import check_folder

    for name in configs:
        check_folder(out_folder / name, resume=(out_folder / name / "config.json").exists())
    try:
        bundle, configs, notes = _data(configs, common)
        for note in notes:
            say(f"note: {note}")
        _check(configs, out_folder, bundle)
        rows = [_arm(name, config, out_folder / name, bundle) for name, config in configs.items()]
        leaks = _audit(configs, out_folder, quick=quick)
    except KeyboardInterrupt:
        say(f"interrupted; continue with the same command: {command_line()}")
        raise typer.Exit(130) from None
    _conclude(rows, out_folder, notes, leaks)


def _configs(common: Mapping[str, Any]) -> dict[str, RunConfig]:
    def flags(arm: Arm) -> dict[str, Any]:
        own = {"federation.method": arm.method, "defense.name": arm.defense, "training.lr": arm.lr}
        return {k: v for k, v in {**common, **own}.items() if v is not None}

    # Not a flag: arms without a lock have no wrong keys.
    base = {"evaluation": {"wrong_key_images": 1_000}}
    return {name: build_config(flags=flags(arm), base=base) for name, arm in DEMO_ARMS.items()}


def _data(
    configs: dict[str, RunConfig], common: Mapping[str, Any]
) -> tuple[DataBundle, dict[str, RunConfig], list[str]]:
    """The data of all arms; scikit-learn's digits where the data set is not there."""
    from fedkl.federation.session import load_data

    first = next(iter(configs.values()))
    notes = []
    try:
        if first.data.dataset != SMALL["data.dataset"]:
            return load_data(first), configs, []
    except DataNotFoundError as error:
        if first.data.root is not None:
            raise
        notes.append(str(error))
    notes.append(
        "The images are scikit-learn's 1,797 digits of 8×8 pixels: the figures show that "
        "everything works, and little more."
    )
    configs = _configs({**common, **SMALL})
    return load_data(next(iter(configs.values()))), configs, notes


def _check(configs: Mapping[str, RunConfig], folder: Path, bundle: DataBundle) -> None:
    """Everything that can go wrong with any arm, before the first one starts."""
    from fedkl.federation.preflight import preflight

    for name, config in configs.items():
        there = (folder / name / "config.json").exists()
        preflight(config, folder / name, resume=there, bundle=bundle)


def _arm(name: str, config: RunConfig, folder: Path, bundle: DataBundle) -> dict[str, Any]:
    """One row: what is in the folder already, or else a run, new or continued."""
    summary = _finished(config, folder)
    if summary is None:
        resume = (folder / "config.json").exists()
        summary = train_one(config, folder, resume=resume, bundle=bundle, label=name)
    else:
        say(f"{name}: done already, in {folder}")
    return {**summary, "name": name, "meaning": DEMO_ARMS[name].meaning}


def _audit(configs: Mapping[str, RunConfig], folder: Path, *, quick: bool) -> dict[str, Any]:
    """What these updates leak: to a search, a shadow client and two replays, with all controls."""
    from fedkl.audit import AuditConfig, run_audit
    from fedkl.report import write_audit_page

    arms = {arm.defense: name for name, arm in DEMO_ARMS.items() if arm.method == "fedavg"}
    config = AuditConfig(
        run=configs[arms["pad"]],
        defenses=tuple(arms),
        attacks=("inverting-gradients", "shadow-label", "replay", "replay-relations"),
        images=QUICK_VICTIMS if quick else VICTIMS,
        effort="quick",
        candidates=100 if configs[arms["pad"]].data.dataset == "fashion-mnist" else 10,
    )
    place = folder / "audit"
    facts = {"command": command_line(), "versions": versions()}
    with watching_audit() as watch:
        result = run_audit(
            config,
            place,
            sources={defense: folder / name for defense, name in arms.items()},
            resume=(place / "audit-config.json").exists(),
            facts=facts,
            listen=watch,
        )
    write_audit_page(place)
    return result


def _finished(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run with the same settings."""
    from fedkl.errors import CheckpointError, ConfigError
    from fedkl.federation import config_from
    from fedkl.federation.config import differences
    from fedkl.files import read_json

    try:
        summary = read_json(folder / "summary.json")
        other = differences(config_from(summary["config"]), config)
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        summary["validation"] = [json.loads(line) for line in lines]
    except (CheckpointError, ConfigError, OSError, ValueError, KeyError, TypeError):
        return None  # missing or damaged: the run is taken up again and writes it anew
    indifferent = {"workers", "device", "checkpoint_every"}
    return None if {d.partition(":")[0] for d in other} - indifferent else dict(summary)


def _conclude(
    rows: list[dict[str, Any]], folder: Path, notes: list[str], leaks: Mapping[str, Any]
) -> None:
    from fedkl.files import write_bytes
    from fedkl.report import arms_curves, write_report

    data = rows[0]["config"]["data"]["dataset"]
    lines = {row["name"]: row["validation"] for row in rows}
    write_bytes(folder / "curves.png", arms_curves(lines))
    page = write_report(
        folder,
        rows,
        title=f"FedKL demo: LeNet on {data}, with and without a lock",
        command=command_line(),
        versions=versions(),
        notes=notes,
        links=[("What the updates of these runs leak: the audit", "audit/report.html")],
    )
    title = f"Accuracy on the test set after {number_of(rows[0]['rounds'], 'round')}"
    out().print(accuracy_table(title, [(row["name"], row["accuracy"]) for row in rows]))
    for row in rows:
        print(f"  {row['name']}: {row['meaning']}")
    print(MEANING)
    print("Where no lock stands, both get what the own key gets: anyone can use the model.")
    for row in rows[-2:]:
        locked = row["accuracy"]
        print(
            f"{row['name']}: own key {percent(locked['own_key'])}, a wrong key "
            f"{percent(locked['wrong_key'])}, the best outsider {percent(locked['outsider'])}, "
            f"an insider (another client's lock) {percent(locked['no_lock'])}."
        )
    show_audit(leaks)
    print(f"Report: {page}   What leaks: {folder / 'audit' / 'report.html'}")
