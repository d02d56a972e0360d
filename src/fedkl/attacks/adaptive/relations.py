"""What secrets cannot scramble: how large a gradient is, and how it lies to other gradients.

However a client's secrets turn its features, an image that the model gets wrong has a large
gradient, and two images that are wrong in the same way have gradients that point alike. Both are
much the same for every client of the federation, a shadow included, so they need no rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from fedkl.attacks.adaptive.sketch import Sketch, Tensors
from fedkl.attacks.adaptive.within import check_finite

SAME: Final = 0.999
"""How far a victim is taken to agree with a client that has its secrets."""
_LIMIT: Final = 6.0  # deviations; what is farther off counts no more
_FEW: Final = 100  # pairs of two classes; with fewer, all pairs like them are taken together
_SUBSET: Final = 600  # public images whose pairs are looked at
_TURNS: Final = 30
_DAMPING: Final = 0.5
_WEIGHT: Final = 0.3  # of one pair: pairs that share an image do not tell as much as their number
_SMALLEST: Final = 1e-30


class SizedSketch(Sketch):
    """A sketch of unit length, with the logarithm of the gradient's size in front of it."""

    def __call__(self, gradients: Tensors) -> Tensor:
        """(N, 1 + length) of gradients by name, each (N, *shape)."""
        size = self.sizes(gradients).clamp_min(_SMALLEST).log()
        sketch = super().__call__(gradients)
        return torch.cat([size[:, None].to(sketch.dtype), normalize(sketch, dim=1)], dim=1)


@dataclass(frozen=True)
class Agreement:
    """How a quantity is distributed, and how far a victim's follows the mean of the shadows'.

    Attributes:
        mean, deviation: Of one client's.
        spread: Deviation of the mean over the shadows.
        follows: Correlation of a victim's with that mean, above 0 and below 1.
    """

    mean: Tensor
    deviation: Tensor
    spread: Tensor
    follows: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Agreement:
        """From the same things as every shadow sees them, (shadows, n).

        Two or more tell how far clients agree. One alone is the victim itself.
        """
        deviation = values.std(dim=1).mean().clamp_min(_SMALLEST)
        mean = values.mean()
        together = values.mean(dim=0)
        count, follows = len(values), values.new_tensor(SAME)
        if count > 1:
            pairwise = (torch.corrcoef(values).sum() - count) / (count * (count - 1))
            one = pairwise.nan_to_num(0.0).clamp(0.01, SAME)
            follows = one * (count / (1 + (count - 1) * one)).sqrt()  # Spearman and Brown
        return cls(mean, deviation, together.std().clamp_min(_SMALLEST), follows.clamp(max=SAME))

    @classmethod
    def stacked(cls, parts: Sequence[Agreement]) -> Agreement:
        """Several at once, (len(parts),)."""
        names = ("mean", "deviation", "spread", "follows")
        return cls(*(torch.stack([getattr(one, name) for one in parts]) for name in names))

    def __getitem__(self, index: Any) -> Agreement:
        return Agreement(
            self.mean[index], self.deviation[index], self.spread[index], self.follows[index]
        )

    def likelihood(self, seen: Tensor, expected: Tensor) -> Tensor:
        """Logarithm, up to a constant, of seeing ``seen`` where the shadows have ``expected``.

        Bivariate normal; attributes, ``seen`` and ``expected`` broadcast.
        """
        z = ((seen - self.mean) / self.deviation).clamp(-_LIMIT, _LIMIT)
        wanted = ((expected - self.mean) / self.spread).clamp(-_LIMIT, _LIMIT)
        return -(z - self.follows * wanted).square() / (2 * (1 - self.follows.square()))


class Relations:
    """What several shadows expect of sizes and pairs, and which candidates explain the victims.

    Args:
        sides: Of every shadow, what it gives away of the public images, (M, 1 + k), as
            :class:`SizedSketch` gives it. A single one has the victim's secrets.
        labels: Of these (M,).
        num_classes: Number of labels.
        sized: Whether victims' gradients have the size that they came with; sizes tell nothing
            where every update is sent at one length.

    Raises:
        AttackError: A side holds NaN or Inf.
    """

    def __init__(
        self, sides: Sequence[Tensor], labels: Tensor, num_classes: int, *, sized: bool = True
    ) -> None:
        self.sized = sized
        for side in sides:
            check_finite(side)
        sizes = torch.stack([side[:, 0] for side in sides])
        classes = [(labels == k).nonzero().flatten() for k in range(num_classes)]
        every = Agreement.of(sizes)
        self.sizes = Agreement.stacked(
            [Agreement.of(sizes[:, own]) if len(own) > 4 else every for own in classes]
        )
        few = max(2, _SUBSET // max(1, sum(len(own) > 0 for own in classes)))
        rows = torch.cat([own[:few] for own in classes])
        seen = torch.stack([side[rows, 1:] for side in sides])
        self.pairs = _pairs(seen, labels[rows], num_classes)

    def by_size(self, seen: Tensor, labels: Tensor, candidates: Tensor) -> Tensor:
        """How likely each candidate is by the size of the victim's gradient: (T, K); 0 if unsized.

        Args:
            seen: What the victims gave away, (T, 1 + k).
            labels: Theirs (T,).
            candidates: The same of their candidates by every shadow, (T, K, shadows, 1 + k); of
                one victim for all, (1, K, shadows, 1 + k).
        """
        expected = candidates[..., 0].mean(dim=2)
        if not self.sized:
            return torch.zeros_like(expected).expand(len(seen), -1)
        own = self.sizes[labels[:, None]]
        return own.likelihood(seen[:, :1], expected)

    def together(self, seen: Tensor, labels: Tensor, candidates: Sequence[Tensor]) -> list[Tensor]:
        """The same by sizes and by pairs of victims under one lock, all candidates weighed at once.

        By :func:`settled`.

        Args:
            seen, labels: As of :meth:`by_size`, of victims under one lock.
            candidates: Of each of them, (K, shadows, 1 + k), K its own.

        Returns:
            Of each, (K,).
        """
        sizes = [len(rows) for rows in candidates]
        most = max(sizes)
        rows = torch.stack([pad(x, (0, 0, 0, 0, 0, most - len(x))) for x in candidates])
        there = torch.arange(most)[None] < torch.tensor(sizes)[:, None]
        score = self.by_size(seen, labels, rows).masked_fill(~there, -torch.inf)
        if len(seen) > 1:
            score = settled(score, self.by_pairs(seen, labels, rows))
        return [one[:size] for one, size in zip(score, sizes, strict=True)]

    def by_pairs(self, seen: Tensor, labels: Tensor, candidates: Tensor) -> Tensor:
        """How likely each pair of candidates is by the cosine of two gradients: (T, K, T, K).

        0 for two candidates of one victim. Arguments as of :meth:`by_size`.
        """
        expected = _cosines(candidates[..., 1:])
        own = seen[:, 1:] @ seen[:, 1:].T
        law = self.pairs[labels[:, None], labels[None]]
        law = law[:, None, :, None]
        tells = law.likelihood(own[:, None, :, None], expected)
        everyone = torch.arange(len(seen))
        tells[everyone, :, everyone, :] = 0.0
        return tells


def settled(alone: Tensor, pairs: Tensor) -> Tensor:
    """What is left of ``alone`` (T, K) when everybody's candidates are weighed by ``pairs``.

    Mean-field: how probable a candidate is is taken with how probable the others' are.
    ``pairs`` (T, K, T, K); -inf in ``alone`` is no candidate.
    """
    score, belief = alone, alone.isfinite().to(alone.dtype)
    belief = belief / belief.sum(dim=1, keepdim=True)
    for _ in range(_TURNS):
        score = alone + _WEIGHT * torch.einsum("iajb,jb->ia", pairs, belief)
        belief = _DAMPING * belief + (1 - _DAMPING) * score.softmax(dim=1)
    return score


def _pairs(sides: Tensor, labels: Tensor, num_classes: int) -> Agreement:
    """By first and second class: of cosines between public images, (classes, classes)."""
    cosines = sides @ sides.transpose(1, 2)
    apart = ~torch.eye(len(labels), dtype=torch.bool)
    alike = labels[:, None] == labels[None]
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    laws = [_law(cosines, apart & among) for among in (alike, ~alike)]
    where = 1 - torch.eye(num_classes, dtype=torch.int64)
    for one in range(num_classes):
        for two in range(one, num_classes):
            if counts[one] * (counts[two] - int(one == two)) >= _FEW:
                here = (labels == one)[:, None] & (labels == two)[None]
                where[one, two] = where[two, one] = len(laws)
                laws.append(_law(cosines, apart & here))
    return Agreement.stacked(laws)[where]


def _law(cosines: Tensor, among: Tensor) -> Agreement:
    """Of the pairs ``among``; of next to none, one by which nothing is told."""
    if int(among.sum()) > 2:
        return Agreement.of(cosines[:, among])
    nothing = cosines.new_tensor(0.0)
    return Agreement(nothing, nothing + 1, nothing + 1, nothing + 0.01)


def _cosines(rows: Tensor) -> Tensor:
    """Of candidates (T, K, shadows, k) at unit length, over the shadows: (T, K, T, K)."""
    count, each, shadows, _ = rows.shape
    flat = rows.flatten(0, 1)
    cosines = torch.zeros(len(flat), len(flat), dtype=rows.dtype)
    for shadow in range(shadows):
        cosines += flat[:, shadow] @ flat[:, shadow].T
    return (cosines / shadows).view(count, each, count, each)
