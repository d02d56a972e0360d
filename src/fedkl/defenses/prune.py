"""Gradient compression: of every tensor the largest entries of the change alone are sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from fedkl.defenses.base import Defense, Sending
from fedkl.pruning import check_ratio, kept

PRUNE_RATIO: Final = 0.9


class Prune(Defense):
    """Small entries of the change are not sent: weights there stay as received, gradients are 0.

    DLG (Zhu et al. 2019, arXiv 1906.08935, section 5.2) finds that this stops it from a ratio of
    about 0.2 on; the compression itself is that of Deep Gradient Compression (Lin et al. 2018,
    arXiv 1712.01887) without its momentum correction and its accumulation of what was left out
    (error feedback): what is removed in a round is lost. Deterministic; of equal entries the first
    stay. Buffers go as they are.

    Args:
        prune_ratio: Share of every parameter tensor's entries that is removed, in [0, 1); one entry
            of every tensor stays.

    Raises:
        ConfigError: A ratio out of range.
    """

    name = "prune"

    def __init__(self, *, prune_ratio: float = PRUNE_RATIO) -> None:
        check_ratio(prune_ratio)
        self.prune_ratio = prune_ratio

    @property
    def known(self) -> dict[str, Any]:
        """The ratio; which entries stayed is seen."""
        return {"prune_ratio": self.prune_ratio}

    def share(self, update: Mapping[str, Tensor], sending: Sending) -> dict[str, Tensor]:
        """``update`` with what was received where little changed."""
        found = {
            name: torch.where(kept(update[name] - before, self.prune_ratio), update[name], before)
            for name, before in sending.start(update).items()
        }
        return {**update, **found}

    def __repr__(self) -> str:
        return f"Prune(prune_ratio={self.prune_ratio:g})"
