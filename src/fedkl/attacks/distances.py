"""How two gradients are compared: over pairs (made, observed), tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

Pairs = Sequence[tuple[Tensor, Tensor]]


def squared(pairs: Pairs) -> Tensor:
    """The squared Euclidean distance over all entries (Zhu et al. 2019, equation 4)."""
    return torch.stack([(made - seen).square().sum() for made, seen in pairs]).sum()


def cosine(pairs: Pairs) -> Tensor:
    """One minus the cosine of the angle between the whole gradients (Geiping et al. 2020).

    As half the squared distance of the two unit vectors, which is the same and keeps its digits
    where the angle is small: 1 - 0.9999999 has one digit left in float32.
    """
    # Inside the root, for its derivative at zero is infinite.
    made = (torch.stack([made.square().sum() for made, _ in pairs]).sum() + 1e-20).sqrt()
    seen = (torch.stack([seen.square().sum() for _, seen in pairs]).sum() + 1e-20).sqrt()
    return 0.5 * torch.stack([(m / made - s / seen).square().sum() for m, s in pairs]).sum()


def wasserstein(pairs: Pairs) -> Tensor:
    """The 1-Wasserstein distance between the two sets of entries.

    In one dimension it is the mean difference of the sorted values, exactly.
    """
    made = torch.cat([made.flatten() for made, _ in pairs]).sort().values
    seen = torch.cat([seen.flatten() for _, seen in pairs]).sort().values
    return (made - seen).abs().mean()


def grnn(pairs: Pairs) -> Tensor:
    """Squared distance plus Wasserstein distance (Ren et al. 2022, GRNN, equation 9)."""
    return squared(pairs) + wasserstein(pairs)


DISTANCES: Final[Mapping[str, Callable[[Pairs], Tensor]]] = {
    "squared": squared,
    "cosine": cosine,
    "grnn": grnn,
}
