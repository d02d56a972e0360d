"""Victims brought into a shadow's coordinates by a rotation, where no entry means the same in both.

A key of another client's draws other features, not only other signs and sizes of the same ones. But
the class means correspond, and the clouds around them have one shape.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fedkl.errors import AttackError

MOST: Final = 64
"""Directions that are rotated."""
_PER_DIRECTION: Final = 4  # victims for each of them at least
_FLAT: Final = 1e-4  # deviations below this part of the greatest are rounding
_ROUNDS: Final = 10


def directions(labels: Tensor) -> int:
    """How many directions victims with these labels (M,) tell the rotation of.

    0: it cannot be told, since they are too few for their classes or all of one.
    """
    classes = len({*labels.tolist()})
    free = len(labels) - classes  # what is left when every class has given up its mean
    return 0 if classes < 2 else min(MOST, len(labels) // _PER_DIRECTION, free)


class Transport:
    """Class means first, then neighbours matched in turn.

    Both sides are whitened in their leading within-class directions. The rotation (orthogonal
    Procrustes) starts from the class means and is fitted again to nearest neighbours of the same
    class (Grave et al. 2019, "Unsupervised alignment of embeddings with Wasserstein Procrustes", in
    its simplest form).

    Args:
        ours: The shadow's inputs in its coordinates (N, d).
        labels: Theirs (N,).
        num_classes: Number of labels.
    """

    def __init__(self, ours: Tensor, labels: Tensor, num_classes: int) -> None:
        self.ours, self.labels, self.num_classes = ours, labels, num_classes
        self._whitened: dict[int, _White] = {}

    def move(self, seen: Tensor, labels: Tensor) -> Tensor:
        """Victims (M, d), standardized by themselves, with labels (M,): in our coordinates.

        What is outside of our leading directions becomes our mean.

        Raises:
            AttackError: These victims tell no rotation (:func:`directions`).
        """
        size = min(directions(labels), seen.shape[1], len(self.ours))
        if size < 1:
            raise AttackError(
                f"got {len(labels)} victims; to tell a rotation takes {_PER_DIRECTION} or more, "
                "of two classes or more, and more victims than classes."
            )
        if size not in self._whitened:  # the same for every group of victims
            self._whitened[size] = _White(self.ours, self.labels, self.num_classes, size)
        ours, theirs = self._whitened[size], _White(seen, labels, self.num_classes, size)
        rotation = procrustes(theirs.means, ours.means)
        for _ in range(_ROUNDS):
            moved, match = theirs.x @ rotation, torch.empty_like(theirs.x)
            for k in sorted({*labels.tolist()}):
                near = ours.x[self.labels == k]
                if not len(near):
                    near = ours.x
                match[labels == k] = near[torch.cdist(moved[labels == k], near).argmin(dim=1)]
            rotation = procrustes(theirs.x, match)
        return ours.lift(theirs.x @ rotation)


class _White:
    """x (N, d) in its ``size`` leading within-class directions, at unit deviation each.

    Attributes:
        x: (N, size).
        means: Of the classes, (classes, size); of one without an example, zero.
    """

    def __init__(self, x: Tensor, labels: Tensor, num_classes: int, size: int) -> None:
        self.middle = x.mean(dim=0)
        means = torch.stack(
            [
                x[labels == k].mean(dim=0) if bool((labels == k).any()) else self.middle
                for k in range(num_classes)
            ]
        )
        _, values, basis = torch.linalg.svd(x - means[labels], full_matrices=False)
        self.basis, self.scale = basis[:size], values[:size] / len(x) ** 0.5
        flat = self.scale <= _FLAT * self.scale.amax().clamp_min(1e-30)
        whiten = torch.where(flat, 0.0, 1 / self.scale.clamp_min(1e-30))
        self.x = (x - self.middle) @ self.basis.T * whiten
        self.means = (means - self.middle) @ self.basis.T * whiten

    def lift(self, y: Tensor) -> Tensor:
        """(N, size) back among x."""
        lifted: Tensor = (y * self.scale) @ self.basis + self.middle
        return lifted


def procrustes(source: Tensor, target: Tensor) -> Tensor:
    """The orthogonal map R (d, d) that brings ``source`` R closest to ``target``, both (N, d)."""
    u, _, v = torch.linalg.svd(source.T @ target)
    rotation: Tensor = u @ v
    return rotation
