"""Clip and noise: the Gaussian mechanism on the whole update, on the client."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from fedkl.defenses.base import Defense, Sending
from fedkl.errors import ConfigError, check_positive, check_size

CLIP: Final = 2.5
NOISE_MULTIPLIER: Final = 0.001


class Noise(Defense):
    """What a client sends is clipped to an L2 norm and gets Gaussian noise.

    The mechanism of Geyer et al. 2017 (arXiv 1712.07557) and McMahan et al. 2018 (arXiv
    1710.06963), but on every client instead of on the sum; DLG (Zhu et al. 2019, section 5.1) tries
    the noise alone. No epsilon is claimed: at multipliers at which networks learn, what could be
    proved of one client's update is empty. Buffers (running statistics, counters) go as they are.

    Args:
        clip: L2 norm over all parameters together that the change is shortened to where it is
            longer, above 0: of weights minus received weights, or of the gradient.
        noise_multiplier: Deviation of the noise of every entry in units of ``clip``, from 0.

    Raises:
        ConfigError: A value out of range.
    """

    name = "noise"

    def __init__(self, *, clip: float = CLIP, noise_multiplier: float = NOISE_MULTIPLIER) -> None:
        check_positive("clip", clip)
        if not 0 <= noise_multiplier < math.inf:
            raise ConfigError(
                f"noise_multiplier must be a number of at least 0, got {noise_multiplier}: the "
                "deviation of the noise in units of clip. Give 0 to clip alone."
            )
        check_size("noise_multiplier * clip", noise_multiplier * clip)
        self.clip, self.noise_multiplier = clip, noise_multiplier

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise of one entry, in the unit of the update."""
        return self.noise_multiplier * self.clip

    @property
    def known(self) -> dict[str, Any]:
        """Clip and deviation; not the noise."""
        return {"clip": self.clip, "noise": self.deviation}

    def share(self, update: Mapping[str, Tensor], sending: Sending) -> dict[str, Tensor]:
        """``update`` with its change clipped and noised, drawn parameter by parameter."""
        start = sending.start(update)
        # In double precision, as updates of one length are made.
        moved = {name: update[name].double() - start[name].double() for name in start}
        parts = [torch.linalg.vector_norm(change) for change in moved.values()]
        size = float(torch.stack(parts).norm()) if parts else 0.0
        factor = self.clip / size if size > self.clip else 1.0
        if factor == 1.0 and self.deviation == 0:
            return dict(update)
        found = {}
        for name, change in moved.items():
            # On the CPU: the same numbers whatever the client computes on.
            drawn = torch.randn(change.shape, generator=sending.generator, dtype=torch.float64)
            noise = self.deviation * drawn.to(change.device)
            whole = start[name].double() + change * factor + noise
            found[name] = whole.to(update[name].dtype)
        return {**update, **found}

    def __repr__(self) -> str:
        return f"Noise(clip={self.clip:g}, noise_multiplier={self.noise_multiplier:g})"
