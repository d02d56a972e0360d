"""Which entries of an update stay when it is pruned: one rule for clients and for attackers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedkl.errors import ConfigError

_DIGITS = 6  # of ratio times entries, where 0.29 * 100 is 28.999999999999996


def check_ratio(ratio: float) -> None:
    """Raises unless ``ratio`` is a share of entries that can be removed.

    Raises:
        ConfigError: It is not in [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ConfigError(
            f"prune_ratio must be in [0, 1), got {ratio:g}: the share of every tensor's entries "
            "that is removed. Give 0.9 to keep the largest tenth."
        )


def kept_count(entries: int, ratio: float) -> int:
    """How many of ``entries`` stay: never more are removed than ``ratio`` says, and one stays."""
    return max(1, entries - math.floor(round(ratio * entries, _DIGITS))) if entries else 0


def kept(change: Tensor, ratio: float) -> Tensor:
    """Where the largest entries of one tensor are, by magnitude.

    Of equal ones the first in memory order stay, so the same tensor always gives the same answer.
    Works under ``torch.func.vmap``; has no derivative.

    Args:
        change: How far a tensor moved, any shape.
        ratio: Share of the entries that is removed, in [0, 1).

    Returns:
        bool, the shape of ``change``, :func:`kept_count` of them True.
    """
    sizes = change.detach().abs().flatten()
    order = torch.sort(sizes, descending=True, stable=True).indices
    first = order[: kept_count(sizes.shape[0], ratio)]
    marks = torch.zeros_like(sizes).scatter(0, first, torch.ones_like(sizes))
    return marks.view(change.shape) > 0
