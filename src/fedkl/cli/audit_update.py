"""``fedkl audit-update``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedkl.cli.audit import watching_audit
from fedkl.cli.provenance import command_line, versions
from fedkl.cli.settings import ATTACKS, EFFORTS
from fedkl.cli.show import out, plain, table_of
from fedkl.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from fedkl.locking import LockSpec


def audit_update(
    model: Annotated[str, typer.Option(help="Model, as of fedkl train.")],
    before: Annotated[Path, typer.Option(help="safetensors of the state before local training.")],
    after: Annotated[Path, typer.Option(help="safetensors of the state after it.")],
    config_file: Annotated[
        Path, typer.Option("--config", help="TOML file: how the update was made.")
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for update.json, pictures/.")],
    attacks: Annotated[
        str, typer.Option(help=f"With commas, of: {', '.join(ATTACKS)}.")
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

      fedkl audit-update --model lenet --before updates/round-000001/global.safetensors
        --after updates/round-000001/client-00000.safetensors --spec summary.json
        --config steps.toml --out runs/update
    """
    from fedkl.attacks import make_attack
    from fedkl.audit import Event
    from fedkl.audit.update import UpdateConfig, audit_update, observe_update, read_state

    chosen = [make_attack(name.strip(), effort) for name in attacks.split(",") if name.strip()]
    if not chosen:
        raise ConfigError(f"got no attack; name one or more of: {', '.join(ATTACKS)}.")
    config = UpdateConfig.from_dict(_steps(config_file))
    observation = observe_update(
        model,
        config,
        read_state(before),
        read_state(after),
        spec=None if spec is None else _spec(spec),
        gradient=gradient,
    )
    images = None
    if truth is not None:
        images = read_state(truth).get("images")
        if images is None:
            raise ConfigError(f"{truth} holds no tensor named 'images'; save one under that name.")
    if out_folder.exists() and not out_folder.is_dir():
        raise OutputError(f"{out_folder} is not a folder; choose another --out.")
    facts = {"command": command_line(), "versions": versions(), "model": model}
    with watching_audit() as watch:
        result = audit_update(
            observation,
            chosen,
            out_folder,
            seed=seed,
            truth=images,
            facts=facts,
            tell=lambda done, of, loss: watch(Event("attack", "", done, of, loss)),
        )
    rows = [
        [e["attack"], str(e["labels"]), _number(e["loss"]), _figures(e)] for e in result["attacks"]
    ]
    columns = ["attack", "labels", "loss", "SSIM to the truth"]
    out().print(table_of("What the update gives away", columns, rows))
    if images is None:
        print("Without --truth nobody can say which picture is right: look at them.")
    print(plain(f"In {out_folder}: update.json, pictures/"))


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
