"""What clients do to an update before they send it, done to a made one: differentiable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from fedkl.observation import Training
from fedkl.pruning import kept

Tensors = Mapping[str, Tensor]

_LEAST: Final = 1e-30


def as_sent(change: Tensors, training: Training) -> dict[str, Tensor]:
    """A made update as its client would send it, but for the noise, which nobody can repeat.

    In the order of the clients: at one length, then pruned and clipped. Which entries stay is told
    by the sizes alone; the derivative is by those that do.

    Args:
        change: By name, one client's, over all shared parameters.
        training: How updates are made.
    """
    found = dict(change)
    if training.length is not None:
        scale = training.length / size_of(found)
        found = {name: part * scale for name, part in found.items()}
    if training.clip_first:
        return pruned(clipped(found, training.clip), training.prune_ratio)
    return clipped(pruned(found, training.prune_ratio), training.clip)


def size_of(change: Tensors) -> Tensor:
    """L2 norm over all tensors, a scalar above 0."""
    now = torch.stack([part.square().sum() for part in change.values()]).sum()
    # Under the root: a gradient of zeros has no length to divide by, and no derivative of one.
    return now.clamp_min(_LEAST).sqrt()


def pruned(change: Tensors, ratio: float | None) -> dict[str, Tensor]:
    """The largest entries of every tensor, zero elsewhere; None: all."""
    if not ratio:
        return dict(change)
    return {name: torch.where(kept(part, ratio), part, 0.0) for name, part in change.items()}


def clipped(change: Tensors, clip: float | None) -> dict[str, Tensor]:
    """Shortened to the L2 norm ``clip`` where it is longer; None: as it is."""
    if clip is None:
        return dict(change)
    scale = clip / size_of(change).clamp_min(clip)
    return {name: part * scale for name, part in change.items()}
