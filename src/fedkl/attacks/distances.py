"""How two gradients are compared: over pairs (made, observed), tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Pairs = Sequence[tuple[Tensor, Tensor]]

LEAST: Final = 1e-35
"""Least squared length of a gradient that has a direction: below it float32 loses digits."""


def squared(pairs: Pairs) -> Tensor:
    """The squared Euclidean distance over all entries (Zhu et al. 2019, equation 4)."""
    return torch.stack([(made - seen).square().sum() for made, seen in pairs]).sum()


def cosine(pairs: Pairs) -> Tensor:
    """One minus the cosine of the angle between the whole gradients (Geiping et al. 2020).

    As half the squared distance of the two unit vectors, which is the same and keeps its digits
    where the angle is small: 1 - 0.9999999 has one digit left in float32. Of a made gradient that
    is zero, or rounds to it when squared, it is 1 with derivative 0; NaN where squares overflow.
    """
    made = [m for m, _ in pairs]
    length: Tensor = _Cosine.apply(*made, *(s for _, s in pairs))[0]
    return length


class _Cosine(Function):
    """:func:`cosine` of n made and n observed tensors, with its derivative by the made ones.

    With d = m/|m| - s/|s| the value is L = |d|²/2 and its gradient (d - L·m/|m|)/|m|: written out,
    it takes half of autograd's passes over the gradients.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        made, seen = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        size = _squares(made)
        there = size >= LEAST
        inverse = torch.where(there, size.rsqrt(), 0)
        other = _squares(seen).clamp_min(LEAST).rsqrt()
        apart = [torch.addcmul(s * -other, m, inverse) for m, s in zip(made, seen, strict=True)]
        value = torch.where(there, 0.5 * _squares(apart), 1)
        return torch.where(torch.isfinite(size), value, torch.nan), inverse, *apart

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[: len(inputs) // 2], *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        count = (len(ctx.saved_tensors) - 2) // 2
        made, (value, inverse) = ctx.saved_tensors[:count], ctx.saved_tensors[count : count + 2]
        apart = ctx.saved_tensors[count + 2 :]
        of_apart = g * inverse
        of_made = -of_apart * value * inverse
        found = [torch.addcmul(m * of_made, d, of_apart) for m, d in zip(made, apart, strict=True)]
        return *found, *(None for _ in made)


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.dot(t.flatten(), t.flatten()) for t in tensors]).sum()


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
