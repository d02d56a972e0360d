"""How two gradients are compared: over pairs (made, observed), tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fedkl.errors import AttackError
from fedkl.observation import Observation

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


def check_size(observation: Observation, names: Sequence[str], *, squared: bool = True) -> None:
    """Looks whether there is something to match in the tensors ``names`` of every update.

    Args:
        observation: The victim.
        names: Of parameters.
        squared: Whether it has to be of a size that can be squared in float32; otherwise any will
            do, for whoever brings updates to one length first.

    Raises:
        AttackError: There is nothing, or it is too large.
    """
    for change in observation.changes:
        tensors = [change[name].detach() for name in names]
        tensors = tensors if squared else [one.double() for one in tensors]
        size = float(torch.stack([one.square().sum() for one in tensors]).sum())
        if size < (LEAST if squared else 1e-300):
            raise AttackError(
                "every entry of the update that could be matched is zero, or rounds to it when "
                "squared (a loss of zero, say): it tells nothing. Leave this victim out."
            )
        if not math.isfinite(size):
            raise AttackError(
                "the update is too large to be compared: its squares overflow. Expected a gradient "
                "or weights before minus after; look how it was scaled."
            )


DISTANCES: Final[Mapping[str, Callable[[Pairs], Tensor]]] = {
    "squared": squared,
    "cosine": cosine,
    "grnn": grnn,
}
