"""``fedkl audit-update``."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedkl.cli.audit import listed, watching_audit
from fedkl.cli.folders import check_update_folder, named
from fedkl.cli.provenance import command_line, versions
from fedkl.cli.settings import ATTACKS, DATASETS, EFFORTS
from fedkl.cli.show import out, plain, table_of
from fedkl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from fedkl.audit import Event
    from fedkl.audit.arsenal import Arsenal
    from fedkl.audit.steps import UpdateConfig
    from fedkl.locking import LockSpec


def audit_update(
    model: Annotated[str, typer.Option(help="Model, as of fedkl train.")],
    before: Annotated[Path, typer.Option(help="safetensors of the state before local training.")],
    after: Annotated[Path, typer.Option(help="safetensors of the state after it.")],
    config_file: Annotated[
        Path, typer.Option("--config", help="TOML file: how the update was made.")
    ],
    out_folder: Annotated[
        Path,
        typer.Option(
            "--out", parser=named, metavar="PATH", help="Folder for update.json, pictures/."
        ),
    ],
    attacks: Annotated[
        str,
        typer.Option(
            help="With commas, or all that one update and --public allow, of: "
            f"{', '.join(ATTACKS)}."
        ),
    ] = "inverting-gradients",
    effort: Annotated[str, typer.Option(help=f"One of: {', '.join(EFFORTS)}.")] = "standard",
    truth: Annotated[
        Path | None,
        typer.Option(help="safetensors with the true 'images' (N, C, H, W) in [0, 1]."),
    ] = None,
    spec: Annotated[
        Path | None,
        typer.Option(help="JSON with the public lock spec, or a run's summary.json that has it."),
    ] = None,
    public: Annotated[
        str | None,
        typer.Option(
            help="Data set whose public images attackers learn from, as ggl and shadow need it: "
            f"{', '.join(DATASETS)}."
        ),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", help="Folder of that data set's files.")
    ] = None,
    gradient: Annotated[
        bool, typer.Option("--gradient", help="--after holds a gradient, as fedsgd sends it.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the attacks.")] = 0,
) -> None:
    """Attack an update that any framework made, from the weights before and after it.

    The file of steps says what the attacker knows: num_classes, channels, image_size, batch_size,
    local_steps, lr, momentum, nesterov, weight_decay, repeats, train_mode, labels.

    Examples:

      fedkl audit-update --model resnet18 --before a.safetensors --after b.safetensors
        --config steps.toml --out runs/update

      fedkl audit-update --model lenet --before a.safetensors --after b.safetensors
        --config steps.toml --public fashion-mnist --attacks ggl,shadow --out runs/update

      fedkl audit-update --model lenet --before updates/round-000001/global.safetensors
        --after updates/round-000001/client-00000.safetensors --spec summary.json
        --config steps.toml --out runs/update
    """
    from fedkl.audit import Event
    from fedkl.audit.steps import UpdateConfig
    from fedkl.audit.update import attackers, audit_update, observe_update, read_state

    check_update_folder(out_folder)
    if data_root is not None and public is None:
        raise ConfigError(
            "--data-root is of the data set that --public names, and there is none: it would do "
            "nothing; add --public, or leave it out."
        )
    config = UpdateConfig.from_dict(_steps(config_file))
    observation = observe_update(
        model,
        config,
        read_state(before),
        read_state(after),
        spec=None if spec is None else _spec(spec),
        gradient=gradient,
    )
    images = None if truth is None else _images(truth)
    facts = {"command": command_line(), "versions": versions(), "model": model}
    names = listed(attacks, _possible(public is not None))
    with watching_audit() as watch:
        arsenal = None
        if public is not None:
            arsenal = _arsenal(public, data_root, config, effort, seed, out_folder, watch)
        result = audit_update(
            observation,
            attackers(names, observation, effort=effort, arsenal=arsenal),
            out_folder,
            seed=seed,
            truth=images,
            facts=facts,
            tell=lambda done, of, loss: watch(Event("attack", "", done, of, loss)),
        )
    _show(result, out_folder)
    if config.lr is None and config.update_length is None and not gradient:
        print(
            "lr is not given, so how large the gradient is is unknown: gradients were compared at "
            "one length."
        )


def _possible(with_public: bool) -> tuple[str, ...]:
    """The attacks on one update, with public images or without."""
    from fedkl.attacks import NEED_MANY, NEED_PUBLIC

    impossible = {*NEED_MANY, *(() if with_public else NEED_PUBLIC)}
    return tuple(name for name in ATTACKS if name not in impossible)


def _images(truth: Path) -> Tensor:
    from fedkl.audit.update import read_state

    images = read_state(truth).get("images")
    if images is None:
        raise ConfigError(f"{truth} holds no tensor named 'images'; save one under that name.")
    return images


def _arsenal(
    public: str,
    root: Path | None,
    config: UpdateConfig,
    effort: str,
    seed: int,
    folder: Path,
    watch: Callable[[Event], None],
) -> Arsenal:
    """Attackers with public images of the data set ``public``, in the form of the update's.

    Raises:
        ConfigError: The data set is unknown, or has another number of classes.
        DataNotFoundError: It is nowhere.
    """
    from fedkl.audit import AuditConfig, Event
    from fedkl.audit.arsenal import Arsenal
    from fedkl.data import load
    from fedkl.federation import config_from

    bundle = load(
        public, root=root, seed=seed, image_size=config.image_size, channels=config.channels
    )
    if bundle.num_classes != config.num_classes:
        raise ConfigError(
            f"--public {public} has {bundle.num_classes} classes, the model {config.num_classes} "
            "(num_classes of --config); give a data set of the victim's kind."
        )
    audit = AuditConfig(run=config_from({"seed": seed}), effort=effort)
    return Arsenal(audit, bundle, folder, lambda *facts: watch(Event(*facts)))


def _show(result: Mapping[str, Any], folder: Path) -> None:
    rows = [
        [e["attack"], str(e["labels"]), _number(e["loss"]), _figures(e)] for e in result["attacks"]
    ]
    columns = ["attack", "labels", "loss", "SSIM to the truth"]
    out().print(table_of("What the update gives away", columns, rows))
    for one in result["failed"]:
        print(plain(f"left out: {one['attack']}: {one['reason']}"))
    if not result["measured"]:
        print("Without --truth nobody can say which picture is right: look at them.")
    print(
        "No verdict: what these attacks miss in one update, others may find in many. fedkl audit "
        "measures that, against controls."
    )
    print(plain(f"In {folder}: update.json, pictures/"))


def _spec(path: Path) -> LockSpec:
    from fedkl.files import read_json
    from fedkl.locking import LockSpec

    data = read_json(path)
    found = data.get("lock_spec", data) if isinstance(data, dict) else data
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path} holds no lock spec; give what lock_spec(model).to_dict() wrote, or the "
            "summary.json of a locked run."
        )
    return LockSpec.from_dict(found)


def _steps(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check --config.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}.") from error


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _figures(entry: dict[str, Any]) -> str:
    return ", ".join(f"{value:.2f}" for value in entry.get("ssim", [])) or "–"
