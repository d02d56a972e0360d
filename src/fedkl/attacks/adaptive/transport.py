"""Victims brought into a shadow's coordinates by a rotation, where no entry means the same in both.

A key of another client's draws other features, not only other signs and sizes of the same ones. But
the class means correspond, and the clouds around them have one shape.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fedkl.attacks.adaptive.within import Within, procrustes, told
from fedkl.errors import AttackError, number_of

MOST: Final = 64
"""Directions that are rotated."""
_PER_DIRECTION: Final = 4  # victims for each of them at least
_ROUNDS: Final = 10


def directions(labels: Tensor) -> int:
    """How many directions victims with these labels (M,) tell the rotation of; 0: none."""
    return told(labels, _PER_DIRECTION, MOST)


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
        self._whitened: dict[int, Within] = {}

    def move(self, seen: Tensor, labels: Tensor) -> Tensor:
        """Victims (M, d), standardized by themselves, with labels (M,): in our coordinates.

        What is outside of our leading directions becomes our mean.

        Raises:
            AttackError: These victims tell no rotation (:func:`directions`).
        """
        size = min(directions(labels), seen.shape[1], len(self.ours))
        if size < 1:
            raise AttackError(
                f"got {number_of(len(labels), 'victim')}; to tell a rotation takes "
                f"{_PER_DIRECTION} or more, of two classes or more, and more victims than classes."
            )
        if size not in self._whitened:  # the same for every group of victims
            self._whitened[size] = Within(self.ours, self.labels, self.num_classes, size)
        ours, theirs = self._whitened[size], Within(seen, labels, self.num_classes, size)
        mine, x = ours.whole(self.ours), theirs.whole(seen)
        rotation = procrustes(theirs.classes, ours.classes)
        for _ in range(_ROUNDS):
            moved, match = x @ rotation, torch.empty_like(x)
            for k in sorted({*labels.tolist()}):
                near = mine[self.labels == k]
                if not len(near):
                    near = mine
                match[labels == k] = near[torch.cdist(moved[labels == k], near).argmin(dim=1)]
            rotation = procrustes(x, match)
        return ours.lift(x @ rotation)
