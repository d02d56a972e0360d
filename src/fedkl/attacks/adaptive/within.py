"""How images of one class differ: the leading directions within classes, at unit deviation."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fedkl.errors import AttackError

_FLAT: Final = 1e-4  # deviations below this part of the greatest are rounding


class Within:
    """Whitened coordinates, the class means taken out.

    Args:
        x: What a client gives away of images (N, d).
        labels: Theirs (N,).
        num_classes: Number of labels.
        size: Directions at most.
        ridge: Part of the mean variance along them that is added to every one, so that directions
            in which hardly anything differs do not count as much as the others.

    Attributes:
        middle: Mean of all (d,).
        means: Of the classes (classes, d); of one without an example, the middle.
        basis: The directions (size, d), the widest first.
        deviation: Along each (size,).
        whiten: 1/deviation, less by the ridge; 0 where there is no deviation.

    Raises:
        AttackError: x holds NaN or Inf.
    """

    def __init__(
        self, x: Tensor, labels: Tensor, num_classes: int, size: int, ridge: float = 0.0
    ) -> None:
        check_finite(x)
        self.middle = x.mean(dim=0)
        self.means = torch.stack(
            [
                x[labels == k].mean(dim=0) if bool((labels == k).any()) else self.middle
                for k in range(num_classes)
            ]
        )
        _, values, basis = torch.linalg.svd(x - self.means[labels], full_matrices=False)
        self.basis, self.deviation = basis[:size], values[:size] / len(x) ** 0.5
        flat = self.deviation <= _FLAT * self.deviation.amax().clamp_min(1e-30)
        variance = self.deviation.square()
        variance = variance + ridge * variance.mean()
        self.whiten = torch.where(flat, 0.0, variance.clamp_min(1e-30).rsqrt())

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """(N, d) with labels (N,), less their class's mean: (N, size)."""
        found: Tensor = (x - self.means[labels]) @ self.basis.T * self.whiten
        return found

    def whole(self, x: Tensor) -> Tensor:
        """(N, d) less the middle alone: (N, size)."""
        found: Tensor = (x - self.middle) @ self.basis.T * self.whiten
        return found

    @property
    def classes(self) -> Tensor:
        """The class means, less the middle: (classes, size)."""
        return self.whole(self.means)

    def lift(self, y: Tensor) -> Tensor:
        """(N, size) as :meth:`whole` gives them, back among x."""
        lifted: Tensor = (y * self.deviation) @ self.basis + self.middle
        return lifted


def check_finite(x: Tensor) -> None:
    """Refuses what a shadow gives away if there are NaN or Inf in it.

    Raises:
        AttackError: That.
    """
    if not bool(x.isfinite().all()):
        raise AttackError(
            "gradients to compare hold NaN or Inf: with these secrets, or on these public images, "
            "the network overflows. Train it longer or at a lower rate, or leave the attack out."
        )


def told(labels: Tensor, each: int, most: int) -> int:
    """How many directions victims with these labels (N,) tell the rotation of, ``most`` at most.

    That takes ``each`` victims for every one. 0: it cannot be told, since they are too few for
    their classes or all of one.
    """
    classes = len({*labels.tolist()})
    free = len(labels) - classes  # what is left when every class has given up its mean
    return 0 if classes < 2 else min(most, len(labels) // each, free)


def procrustes(source: Tensor, target: Tensor) -> Tensor:
    """The orthogonal map R (d, d) that brings ``source`` R closest to ``target``, both (N, d)."""
    u, _, v = torch.linalg.svd(source.T @ target)
    rotation: Tensor = u @ v
    return rotation
