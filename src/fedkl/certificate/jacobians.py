"""An observation as a function of images and secrets, in float64, and its derivatives."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.functional import one_hot

from fedkl.attacks.network import Network
from fedkl.errors import AttackError
from fedkl.observation import Observation

# Tangents pushed forward at a time: as many as are fast without taking much memory.
_AT_ONCE = 64
# Wrong images, labels or secrets are off by about all; float32 loses digits where p(y) is near 1.
_AGREEMENT = 0.1


class Presented:
    """T updates of one victim as a function of what the attacker does not know.

    Everything is computed in float64, whatever the model's dtype: ranks need the digits.

    Args:
        observation: What was seen of one victim. Whatever its threat model grants, every tensor
            in ``observation.secrets`` is taken for unknown.
        images: The true images (T, images, C, H, W).
        labels: The true labels (T, images); taken for known, since they leak.
        secrets: True values of the private parameters, by name.

    Raises:
        AttackError: Number or shape does not fit, a secret is missing, or the model does not give
            the observed gradient at these images, labels and secrets.
    """

    def __init__(
        self,
        observation: Observation,
        images: Tensor,
        labels: Tensor,
        secrets: Mapping[str, Tensor],
    ) -> None:
        self.network = Network(replace(observation, model=deepcopy(observation.model).double()))
        expected = (observation.count, observation.training.images, *observation.image_shape)
        if tuple(images.shape) != expected or tuple(labels.shape) != expected[:2]:
            raise AttackError(
                f"got images of shape {tuple(images.shape)} and labels of {tuple(labels.shape)}, "
                f"expected {expected} and {expected[:2]}: those behind every update."
            )
        if missing := sorted(set(self.network.secrets) - set(secrets)):
            raise AttackError(
                f"the true value of {missing[0]} is missing; a certificate is taken at the true "
                "secrets, so pass those that held_secrets(model) gives."
            )
        self.images, self.classes = images.double(), observation.num_classes
        self.targets = one_hot(labels, observation.num_classes).double()
        self.names = tuple(self.network.secrets)
        self._shapes = [self.network.secrets[name].shape for name in self.names]
        parts = [secrets[name].detach().double().flatten() for name in self.names]
        self.secrets = torch.cat(parts) if parts else images.new_zeros(0).double()
        self._check(observation)

    @property
    def inputs(self) -> int:
        """Unknown pixels of one update."""
        return self.images[0].numel()

    @property
    def values(self) -> int:
        """Observed numbers of one update."""
        return sum(parameter.numel() for parameter in self.network.shared.values())

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Secrets by name from one flat vector."""
        sizes = [math.prod(shape) for shape in self._shapes]
        parts = torch.split(flat, sizes)
        return {n: p.view(s) for n, p, s in zip(self.names, parts, self._shapes, strict=True)}

    def seen(self, t: int, images: Tensor, secrets: Tensor) -> Tensor:
        """The ``t``-th update, flat, as it would be with these images and (flat) secrets."""
        change = self.network.change(self.named(secrets), images, self.targets[t])
        return torch.cat([value.flatten() for value in change.values()])

    def by_inputs(self, t: int) -> Tensor:
        """J_x of the ``t``-th update: (values, inputs)."""
        return columns(lambda x: self.seen(t, x, self.secrets), self.images[t])

    def by_secrets(self, t: int) -> Tensor:
        """J_s of the ``t``-th update: (values, secrets)."""
        return columns(lambda s: self.seen(t, self.images[t], s), self.secrets)

    def _check(self, observation: Observation) -> None:
        # The images of several steps are seen in an order that nobody wrote down.
        if observation.kind != "gradient":
            return
        for t, change in enumerate(observation.changes):
            made = self.seen(t, self.images[t], self.secrets)
            flat = [v.double().flatten() for v in self.network.observed(change).values()]
            there = torch.cat(flat)
            apart = float((made - there).norm()) / max(float(there.norm()), 1e-300)
            if not apart <= _AGREEMENT:
                raise AttackError(
                    f"update {t} differs by {apart:.1%} from what the model gives at the images, "
                    "labels and secrets that were passed; pass the true ones, in order."
                )


def columns(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The Jacobian of ``function`` (any shape → (m,)) as (m, numel), by forward differentiation."""
    size = at.numel()

    def push(tangent: Tensor) -> Tensor:
        return pushed(function, (at,), (tangent.view_as(at),))

    parts = [vmap(push)(block) for block in _basis(size, at)]
    if not parts:
        return at.new_zeros(len(function(at)), 0)
    return torch.cat(parts).T


def pushed(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> Tensor:
    """The derivative of ``function`` at ``at`` along ``tangents``, by forward differentiation."""
    with warnings.catch_warnings():
        # PyTorch loads its own decompositions with a function that it has deprecated itself.
        warnings.filterwarnings("ignore", "`torch.jit.script` is", FutureWarning)
        found = jvp(function, at, tangents)[1]
    assert isinstance(found, Tensor)
    return found


def _basis(size: int, like: Tensor) -> Iterator[Tensor]:
    for start in range(0, size, _AT_ONCE):
        count = min(_AT_ONCE, size - start)
        block = like.new_zeros(count, size)
        block[torch.arange(count), start + torch.arange(count)] = 1.0
        yield block
