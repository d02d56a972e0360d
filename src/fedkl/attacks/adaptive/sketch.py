"""What an update tells of its gradient, made short."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

from fedkl.attacks.network import Network
from fedkl.errors import AttackError
from fedkl.observation import Observation

Tensors = Mapping[str, Tensor]

_LEAST: Final = 1e-35  # a size that can still be divided by in single precision


class Sketch:
    """Gradients of any size as vectors of one length, inner products kept on average.

    How much an example was missed is no part of its image, so every tensor is scaled to norm 1
    (less if it is small beside the others; zero if it is rounding noise, as that of a bias before a
    batch norm), and the gradient of a linear layer, the outer product of its bias's gradient and
    its input, is replaced by that input. Then entries are added up with random signs in random
    places (count sketch, Charikar et al. 2002), which takes no matrix. What is shorter than the
    sketch stays as it is.

    Args:
        shared: Shared parameters by name, for their sizes.
        length: Entries of a sketch.
        generator: Draws signs and places.
    """

    SMALL: Final = 1e-3
    NOISE: Final = 1e-5

    def __init__(self, shared: Tensors, length: int, generator: torch.Generator) -> None:
        self.names = tuple(shared)
        one = {name: torch.zeros(1, *value.shape) for name, value in shared.items()}
        size = sum(value.shape[1] for value in self._flat(one))
        self.length = length if size > length else 0
        self.places = torch.randint(length, (size,), generator=generator)
        self.signs = torch.randint(2, (size,), generator=generator).float() * 2 - 1

    def __call__(self, gradients: Tensors) -> Tensor:
        """(N, length) of gradients by name, each (N, *shape)."""
        sizes = self.sizes(gradients).clamp_min(_LEAST)
        # At length 1 first: squares of what is very large or small are none in single precision.
        rows = self._flat({name: _over(gradients[name], sizes) for name in self.names})
        norms = torch.stack([row.norm(dim=1) for row in rows])
        largest = norms.amax(dim=0)
        scale = 1 / torch.maximum(norms, largest * self.SMALL).clamp_min(1e-30)
        scale = torch.where(norms > largest * self.NOISE, scale, 0.0)
        flat = torch.cat([row * s[:, None] for row, s in zip(rows, scale, strict=True)], dim=1)
        return self._added_up(flat)

    def sizes(self, gradients: Tensors) -> Tensor:
        """How large gradients are, (N,) in double precision."""
        found: Tensor = self._norms(gradients).norm(dim=0)
        return found

    def _norms(self, gradients: Tensors) -> Tensor:
        """(names, N), in double precision, where squares do not overflow."""
        rows = [gradients[name].flatten(1) for name in self.names]
        return torch.stack([torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) for x in rows])

    def _added_up(self, flat: Tensor) -> Tensor:
        if self.length == 0:
            return flat
        out = flat.new_zeros(len(flat), self.length)
        return out.index_add_(1, self.places, flat * self.signs)

    def _flat(self, gradients: Tensors) -> list[Tensor]:
        found = []
        for name in self.names:
            value, bias = gradients[name], gradients.get(name.removesuffix("weight") + "bias")
            if value.ndim == 3 and bias is not None and bias.shape == value.shape[:2]:
                missed = bias / bias.norm(dim=1, keepdim=True).clamp_min(1e-30)
                value = torch.einsum("nij,ni->nj", value, missed)  # as long as the gradient was
            found.append(value.flatten(1))
        return found


class LinearSketch(Sketch):
    """Gradients made short so that the sketch of a sum is the sum of the sketches.

    For updates of several images. Every tensor has one scale for all, at which the updates seen
    have norm 1 on average, and nothing else is done to it.

    Args:
        shared, length, generator: As of :class:`Sketch`.
        seen: What the updates of all victims tell of their gradients, each name (T, *shape). Every
            one of them counts alike, however large it is.

    Raises:
        AttackError: There is nothing in them, or they are not finite.
    """

    def __init__(
        self,
        shared: Tensors,
        length: int,
        generator: torch.Generator,
        seen: Iterable[Tensors],
    ) -> None:
        super().__init__(shared, length, generator)
        if not shared:
            raise AttackError("the model shares no parameter; without a gradient nothing is told.")
        norms = torch.cat([self._norms(one) for one in seen], dim=1)
        whole = norms.norm(dim=0)
        _check(whole)
        parts = (norms / whole.clamp_min(1e-300)).square().mean(dim=1).sqrt()
        scales = 1 / torch.maximum(parts, parts.amax() * self.SMALL)
        scales = torch.where(parts > parts.amax() * self.NOISE, scales, 0.0)
        scales = scales / whole[whole > 0].median()
        rows = zip(scales.tolist(), shared.values(), strict=True)
        self.scales = torch.cat([torch.full((value.numel(),), scale) for scale, value in rows])

    def __call__(self, gradients: Tensors) -> Tensor:
        """(N, length) of gradients by name, each (N, *shape)."""
        return self._added_up(torch.cat(self._flat(gradients), dim=1) * self.scales)

    def _flat(self, gradients: Tensors) -> list[Tensor]:
        return [gradients[name].flatten(1) for name in self.names]


def _over(values: Tensor, sizes: Tensor) -> Tensor:
    """Values (N, *shape) divided by sizes (N,)."""
    return values * (1 / sizes).to(values.dtype).view(-1, *[1] * (values.ndim - 1))


def _check(norms: Tensor) -> None:
    if not bool(norms.isfinite().all()):
        raise AttackError(
            "the gradients behind the updates are not finite; an update is divided by the learning "
            "rate and the steps it was made with, so give that learning rate."
        )
    if not bool(norms.any()):
        raise AttackError("the updates are all zero; there is nothing in them to compare.")


def gradients_of(observation: Observation, network: Network) -> dict[str, Tensor]:
    """Gradients (T, *shape) by name."""
    found = {}
    for name, value in network.shared.items():
        stacked = torch.stack([change[name] for change in observation.changes])
        if observation.kind == "update":
            stacked = observation.training.gradient(stacked, value)
        found[name] = stacked
    return found
