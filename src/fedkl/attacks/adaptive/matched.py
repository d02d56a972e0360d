"""Victims brought into the coordinates of several shadows at once, without anyone known in both.

What a victim's gradient says lies in directions of its own, since its secrets are its own; but it
says it of images that resemble public ones. So: guess which images of its class a victim resembles,
rotate victims onto them, look again, and take more directions into account as the guesses improve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedkl.attacks.adaptive.within import Within, procrustes, told
from fedkl.errors import AttackError, number_of

MOST: Final = 256
"""Directions that are rotated at most."""
_PER_DIRECTION: Final = 5  # victims for each of them at least
_FIRST: Final = 12  # directions to begin with
_GROWTH: Final = 1.5
_ROUNDS: Final = 6  # before the next directions come in
_SHARPNESS: Final = 10.0  # of guesses, by cosine


def rotated(labels: Tensor) -> int:
    """How many directions victims with these labels (N,) tell the rotation of; 0: none."""
    return told(labels, _PER_DIRECTION, MOST)


class Pool:
    """The same images as several shadows see them.

    Args:
        sides: Of every shadow, what it gives away of each image, (M, size); the first
            :data:`MOST` entries count.
        labels: Of the images (M,).
    """

    def __init__(self, sides: Sequence[Tensor], labels: Tensor) -> None:
        self.sides, self.labels = [side[:, :MOST] for side in sides], labels
        self._classes: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def of(self, label: int) -> tuple[Tensor, list[Tensor]]:
        """Rows of a class, and the sides there; of a class without an image, all."""
        if label not in self._classes:  # many groups of victims ask for the same
            rows = (self.labels == label).nonzero().flatten()
            rows = rows if len(rows) else torch.arange(len(self.labels))
            self._classes[label] = rows, [side[rows] for side in self.sides]
        return self._classes[label]


class Matched:
    """Rotations found by guessing and fitting in turn.

    Expectation and maximization: who resembles whom is a soft choice by the mean cosine over all
    shadows, and each shadow's rotation is the orthogonal Procrustes solution to the means of what
    was chosen, as in Grave et al. 2019 ("Unsupervised alignment of embeddings with Wasserstein
    Procrustes") and in iterative closest points; class means give the first.

    Args:
        public: Labeled images that the attacker has.
        means: Of every shadow, the class means in its coordinates (classes, size).
    """

    def __init__(self, public: Pool, means: Sequence[Tensor]) -> None:
        self.public, self.means = public, list(means)

    def fit(
        self,
        seen: Tensor,
        labels: Tensor,
        pool: Pool | None = None,
        allowed: Tensor | None = None,
    ) -> list[Tensor]:
        """Victims under one lock in the coordinates of every shadow, (N, k) each.

        Args:
            seen: What they gave away (N, d).
            labels: Their labels (N,), which :func:`rotated` accepts.
            pool: Images to guess among, instead of the public ones.
            allowed: Which of these come into question for each victim: bool (N, M).

        Raises:
            AttackError: These victims tell no rotation.
        """
        if not rotated(labels):
            raise AttackError(
                f"got {number_of(len(labels), 'victim')}; to tell a rotation takes "
                f"{_PER_DIRECTION} or more, of two classes or more, and more victims than classes."
            )
        most = min(rotated(labels), seen.shape[1], *(m.shape[1] for m in self.means))
        own = Within(seen, labels, len(self.means[0]), most)
        x, present = own(seen, labels), sorted({*labels.tolist()})
        size = min(_FIRST, most)
        moved = [
            x[:, :size] @ procrustes(own.classes[present, :size], mean[present, :size])
            for mean in self.means
        ]
        for _ in range(_ROUNDS):
            moved = self._turn(x, labels, moved, self.public, None, size)
        pool = self.public if pool is None else pool
        while True:
            for _ in range(_ROUNDS):
                moved = self._turn(x, labels, moved, pool, allowed, size)
            if size == most:
                return moved
            size = min(most, int(size * _GROWTH) + 1)
            moved = self._turn(x, labels, moved, pool, allowed, size)

    def _turn(
        self,
        x: Tensor,
        labels: Tensor,
        moved: list[Tensor],
        pool: Pool,
        allowed: Tensor | None,
        size: int,
    ) -> list[Tensor]:
        """Guesses by ``moved``, and victims rotated onto them in ``size`` directions."""
        wanted = [x.new_empty(len(x), size) for _ in moved]
        for label in sorted({*labels.tolist()}):
            mine, (theirs, sides) = (labels == label).nonzero().flatten(), pool.of(label)
            score = torch.stack(
                [cosines(m[mine], s) for m, s in zip(moved, sides, strict=True)]
            ).mean(dim=0)
            if allowed is not None:
                score = score.masked_fill(~allowed[mine][:, theirs], -torch.inf)
            chosen = (_SHARPNESS * len(moved) ** 0.5 * score).softmax(dim=1)
            for one, side in zip(wanted, sides, strict=True):
                one[mine] = chosen @ side[:, :size]
        return [x[:, :size] @ procrustes(x[:, :size], one) for one in wanted]


def cosines(moved: Tensor, side: Tensor) -> Tensor:
    """Cosines (N, M) of victims (N, k) and images (M, size) in the first k directions."""
    mine, theirs = normalize(moved, dim=1), normalize(side[:, : moved.shape[1]], dim=1)
    found: Tensor = mine @ theirs.T
    return found
