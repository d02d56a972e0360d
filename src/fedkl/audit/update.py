"""An update of any other framework: two weight files, and what they give away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedkl import metrics
from fedkl.attacks import (
    ATTACKS,
    NEED_MANY,
    NEED_PUBLIC,
    Attack,
    Progress,
    Reconstruction,
    check_installed,
    make_attack,
)
from fedkl.attacks.adaptive import adaptive_for
from fedkl.audit.arsenal import Arsenal
from fedkl.audit.measure import number
from fedkl.audit.pictures import save_png
from fedkl.audit.steps import UpdateConfig
from fedkl.errors import AttackError, ConfigError, StateError, unknown
from fedkl.federation.length import length_of
from fedkl.files import make_folder, write_json
from fedkl.locking import LockSpec, copy_state, shared_views, state_problems
from fedkl.locking.rebuild import rebuild, secret_names
from fedkl.models import build
from fedkl.observation import OPEN, Observation, threat_of
from fedkl.rng import derive


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        StateError: It cannot be read.
    """
    if not Path(path).is_file():
        raise StateError(f"{path} is not there, or no file; give a safetensors file.")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StateError(
            f"{path} cannot be read as safetensors ({error}); write it with "
            "safetensors.torch.save_file(state, path)."
        ) from error


def observe_update(
    model: str,
    config: UpdateConfig,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    spec: LockSpec | None = None,
    gradient: bool = False,
) -> Observation:
    """What an attacker sees of ``before`` and ``after``: weights, and statistics if sent.

    Args:
        model: Its name.
        config: How the update was made.
        before: The shared state that the client received.
        after: The shared state that it sent back.
        spec: The public lock spec of a locked model: what is private becomes an unknown.
        gradient: ``after`` holds the gradient of one step, as ``fedsgd`` sends it, with or without
            buffers.

    Raises:
        ConfigError: ``gradient`` of an update of several steps, or with momentum or weight decay,
            or a learning rate so small that the gradient overflows.
        StateError: A state does not fit the model, or holds NaN or Inf.
        AttackError: The two are equal: there is nothing to see.
    """
    if gradient:
        config = _of_one_gradient(config)
    network = build(
        model,
        num_classes=config.num_classes,
        channels=config.channels,
        image_size=config.image_size,
        generator=derive(0, "update"),
    )
    if spec is not None:
        network = rebuild(network, spec)
    own = shared_views(network)
    if gradient:  # buffers have none: whether they came along makes no difference
        still = own.keys() - {n for n, _ in network.named_parameters(remove_duplicate=False)}
        after = {**{n: before[n] for n in still if n in before}, **after}
    for what, state in (("before", before), ("after", after)):
        _check_state(own, state, what, model)
    copy_state(own, before, "state before")
    shared = [n for n, _ in network.named_parameters() if n in own]
    change = {n: after[n] if gradient else before[n] - after[n] for n in shared}
    if not any(bool(t.any()) for t in change.values()):
        raise AttackError("before and after are equal: an update without a change shows nothing.")
    buffers = {n: after[n] for n in own if n not in shared}
    # What stands as it was has not been sent, or not been moved: it tells of no image.
    moved = not gradient and any(
        t.is_floating_point() and not torch.equal(t, before[n]) for n, t in buffers.items()
    )
    return _observation(network, config, change, buffers if moved else {}, spec)


def _check_state(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str, model: str
) -> None:
    """Raises unless ``state`` has the names, shapes and dtypes of ``own``, and is finite."""
    if problems := state_problems(own, state):
        cast = {n: t.to(own[n].dtype) if n in own else t for n, t in state.items()}
        remedy = (
            "Name the model it was made with, check num_classes, channels and image_size, and of a "
            "locked model give its own lock spec."
            if state_problems(own, cast)
            else "Cast them before you save them, as in tensor.to(torch.float32)."
        )
        raise StateError(
            f"the state {what} does not fit model {model!r}: {'; '.join(problems[:4])}. {remedy}"
        )
    if bad := [n for n, t in state.items() if not bool(torch.isfinite(t).all())]:
        raise StateError(
            f"the state {what} holds NaN or Inf in {', '.join(bad[:4])}; give one of before the "
            "training diverged."
        )


def _of_one_gradient(config: UpdateConfig) -> UpdateConfig:
    """``config`` of a gradient, which no rate has scaled."""
    one = UpdateConfig(num_classes=config.num_classes)
    names = ("local_steps", "repeats", "momentum", "nesterov", "weight_decay")
    if given := [n for n in names if getattr(config, n) != getattr(one, n)]:
        said = ", ".join(f"{n} = {getattr(config, n)}" for n in given)
        raise ConfigError(
            f"a gradient is of one step; got {said}. Leave that out of the file of steps, or give "
            "the weights after those steps without --gradient."
        )
    return replace(config, lr=1.0)


def _observation(
    network: nn.Module,
    config: UpdateConfig,
    change: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    spec: LockSpec | None,
) -> Observation:
    labels = None if config.labels is None else torch.tensor([list(config.labels)])
    single = config.local_steps == 1 and not (config.momentum or config.weight_decay)
    training = config.training
    if config.update_length is not None or config.lr is None:
        # Without a rate a single step tells its gradient but for the scale: as if sent at a length,
        # which is there to be seen.
        training = replace(training, length=length_of(change))
    else:
        divided = {name: _divided(value, config.lr, name) for name, value in change.items()}
        change = divided if single else change
    return Observation(
        model=network,
        kind="gradient" if single else "update",
        changes=(change,),
        image_shape=(config.channels, config.image_size, config.image_size),
        num_classes=config.num_classes,
        training=training,
        threat=OPEN if spec is None else threat_of("adaptive"),
        secrets=() if spec is None else secret_names(network),
        labels=labels,
        spec=None if spec is None else spec.to_dict(),
        statistics=(statistics,) if statistics else (),
    )


def _divided(change: Tensor, lr: float, name: str) -> Tensor:
    found = change / lr
    if not bool(torch.isfinite(found).all()):
        raise ConfigError(
            f"lr is {lr:g}, and the change of {name} divided by it, which tells the gradient, is "
            f"more than {found.dtype} holds; give the learning rate of the client's steps."
        )
    return found


def attackers(
    names: Sequence[str],
    observation: Observation,
    *,
    effort: str,
    arsenal: Arsenal | None = None,
) -> dict[str, Callable[[], Attack]]:
    """What makes each of the attacks when its turn comes, as someone mounts it who knows the lock.

    Args:
        names: Of attacks.
        observation: The update.
        effort: ``quick``, ``standard`` or ``paper``.
        arsenal: Has public images; without one there are none.

    Raises:
        ConfigError: A name is unknown, there is none, or an attack cannot be mounted with what
            there is.
    """
    for name in names:
        if name not in ATTACKS:
            raise ConfigError(unknown("attack", name, ATTACKS))
    if not names:
        raise ConfigError(f"got no attack; name one or more of: {', '.join(ATTACKS)}.")
    if hungry := [n for n in names if n in NEED_PUBLIC and arsenal is None]:
        raise ConfigError(
            f"{', '.join(hungry)}: these learn from public images of the victim's kind, and got "
            "none; add --public with a data set, or leave them out."
        )
    if many := [n for n in names if n in NEED_MANY]:
        raise ConfigError(
            f"{', '.join(many)} compare 20 or more updates under one lock, and this is one; take "
            "shadow, shadow-gradient, retrieval or replay instead."
        )
    check_installed(names, effort)

    def alone(name: str) -> Attack:
        return adaptive_for(observation.threat, make_attack(name, effort), observation)

    if arsenal is None:
        return {name: partial(alone, name) for name in names}
    return {n: partial(arsenal.attack, n, observation.threat, observation) for n in names}


def audit_update(
    observation: Observation,
    attacks: Mapping[str, Callable[[], Attack]],
    folder: Path,
    *,
    seed: int = 0,
    truth: Tensor | None = None,
    facts: Mapping[str, Any] | None = None,
    tell: Progress | None = None,
) -> dict[str, Any]:
    """Mounts ``attacks`` on one update; writes ``update.json`` and pictures below ``folder``.

    What is finished is on disk at once, and stays when a later attack cannot be mounted: that one
    is named under ``failed``.

    Args:
        observation: The update.
        attacks: To be made and mounted one after the other, by name.
        folder: Made if missing.
        seed: Of the attacks.
        truth: True images (images, C, H, W) in [0, 1], to measure against; without them nobody
            can say whether a picture is right, and no verdict is given.
        facts: Further entries of the JSON.
        tell: Progress, as of an attack.

    Returns:
        The contents of ``update.json``.

    Raises:
        AttackError: Not one of the attacks can be mounted; nothing is written then.
        StateError: The truth does not fit the update.
    """
    _check_truth(observation, truth)
    result: dict[str, Any] = {
        "format": "fedkl-update-audit",
        "version": 1,
        **(facts or {}),
        "kind": observation.kind,
        "training": vars(observation.training),
        "measured": truth is not None,
        "attacks": [],
        "failed": [],
    }
    for name, make in attacks.items():
        try:
            attack = make()
            (found,) = attack.reconstruct(
                [observation], generator=derive(seed, "attack", name), progress=tell
            )
        except AttackError as error:
            result["failed"].append({"attack": name, "reason": str(error)})
        else:
            make_folder(folder / "pictures")
            result["attacks"].append(_entry(name, attack, found, folder, truth))
        if result["attacks"]:
            write_json(folder / "update.json", result)
    if not result["attacks"]:
        reasons = "; ".join(f"{one['attack']}: {one['reason']}" for one in result["failed"])
        raise AttackError(f"no attack could be mounted. {reasons}")
    return result


def _check_truth(observation: Observation, truth: Tensor | None) -> None:
    if truth is None:
        return
    wanted = (observation.training.images, *observation.image_shape)
    if truth.shape != wanted:
        raise StateError(
            f"got true images {tuple(truth.shape)}; expected {wanted}: every image behind the "
            "update (batch_size x local_steps), each (C, H, W)."
        )
    metrics.mse(truth, truth)  # raises on what could not be measured, before hours of attacks


def _entry(
    name: str, attack: Attack, found: Reconstruction, folder: Path, truth: Tensor | None
) -> dict[str, Any]:
    images, order = found.images[0], torch.arange(len(found.images[0]))
    figures: dict[str, list[float]] = {}
    if truth is not None:
        order = metrics.best_matching(images, truth)
        figures = {
            "ssim": metrics.ssim(images[order], truth).tolist(),
            "mse": metrics.mse(images[order], truth).tolist(),
        }
    paths = []
    for number_, image in enumerate(images[order]):
        path = f"pictures/{name}-{number_}.png"
        save_png(image, folder / path)
        paths.append(path)
    return {
        "attack": name,
        "settings": repr(attack),
        "labels": found.labels[0][order].tolist(),
        "loss": number(found.loss),
        "notes": list(found.notes),
        "pictures": paths,
        **figures,
    }
