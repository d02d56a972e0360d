"""Updates of one length: how far a client moved tells how badly the model did on its images."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fedkl.errors import ConfigError, StateError
from fedkl.federation.config import TrainingConfig


def length_of(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm of all tensors together, in double precision.

    Args:
        tensors: By name, any shapes.
    """
    parts = [torch.linalg.vector_norm(t.detach(), dtype=torch.float64) for t in tensors.values()]
    return float(torch.stack(parts).norm()) if parts else 0.0


def at_length(
    update: Mapping[str, Tensor],
    length: float,
    *,
    received: Mapping[str, Tensor] | None = None,
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """The update, shortened or stretched to ``length``; its direction stays.

    The size of a gradient is large where the model errs, for every client and under every key, so
    that it tells images apart (docs/theory.md, "Sizes and relations need no coordinates"); not so
    if all updates have one length, agreed in public. The direction tells what it told: this is
    what training with differential privacy does to gradients (Bu et al. 2023, "Automatic
    clipping"), without the noise, and without what that proves. Train without weight decay.

    Args:
        update: What a client is about to send, by name.
        length: L2 norm over all that moves, above 0. An update that does not move at all stays.
        received: The weights that training began with, if ``update`` is weights, whose difference
            is what is seen; None: it is a gradient, or a difference already.
        names: What moves; all floating-point tensors if not given. The rest stays as it is, as
            running statistics should (a stretched variance may fall below 0): of a model that
            shares some, give the names of its parameters.

    Returns:
        A new dict with the names of ``update``.

    Raises:
        ConfigError: The length is not a finite number above 0.
        StateError: ``received`` lacks a tensor.
    """
    if not 0 < length < math.inf:
        raise ConfigError(
            f"the length of an update must be a finite number above 0, got {length:g}."
        )
    named = (
        {name for name, t in update.items() if t.is_floating_point()} if names is None else names
    )
    moving = [name for name in update if name in named]
    if received is not None and (missing := [n for n in moving if n not in received]):
        raise StateError(
            f"the received weights lack {', '.join(missing[:4])} of the update; give the state "
            "that training began with."
        )
    start = {n: torch.zeros_like(update[n]) if received is None else received[n] for n in moving}
    moved = {name: update[name] - start[name] for name in moving}
    now = length_of(moved)
    if now == 0:
        return dict(update)
    # In double precision: of a tiny update the factor is more than its own dtype holds.
    whole = {n: start[n].double() + change.double() * (length / now) for n, change in moved.items()}
    return {**update, **{n: value.to(update[n].dtype) for n, value in whole.items()}}


def decayed(config: TrainingConfig) -> str:
    """What clients should know who send weights at one length, in words; empty if nothing.

    Args:
        config: How they train.
    """
    if config.update_length is None or not config.weight_decay:
        return ""
    return (
        f"updates are sent at one length, but with a weight decay of {config.weight_decay:g}: how "
        "much of an update points along the weights, which the server knows, tells how large the "
        "gradient was all the same. Give --weight-decay 0, or --method fedsgd, where the server "
        "decays."
    )
