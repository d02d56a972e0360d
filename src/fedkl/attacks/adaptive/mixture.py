"""Which of given gradients an update of several images is the sum of."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

SHORTLIST: Final = 500
_ROUNDS: Final = 500
_FEW: Final = 16  # gradients that are taken in at once, at first
_RIDGE: Final = 1e-6  # where gradients are more than equations, or alike
_TIE: Final = 1e-6


def nonnegative(atoms: Tensor, target: Tensor) -> Tensor:
    """Weights w of 0 or more that minimize ‖target − Σ w·atoms‖², but for rounding.

    The active sets of Lawson and Hanson (1974), as ``scipy.optimize.nnls`` has them, but many atoms
    are taken in at once: of thousands that takes seconds, not minutes. Steps along the gradient are
    no way out. Gradients of one class are much alike, and after hundreds of steps the weights are
    still spread over all that resemble the true ones.

    Args:
        atoms: (M, k), of unit length or so.
        target: (k,), the same.

    Returns:
        (M,); NaN where anything is not finite.
    """
    wanted = (atoms @ target).double()
    if not bool(wanted.isfinite().all()):
        return torch.full_like(atoms[:, 0], torch.nan)
    weights = torch.zeros_like(wanted)
    most = len(atoms)
    for _ in range(_ROUNDS):
        held = weights > 0
        left = atoms @ (weights.to(atoms) @ atoms)
        slope = (wanted - left - _RIDGE * weights).masked_fill(held, 0)
        room = int((slope > _RIDGE).sum())
        if room == 0 or most == 0:
            break
        new = slope.topk(min(most, room, max(_FEW, int(held.sum()) // 4))).indices
        held[new] = True
        before, weights = weights, _within(atoms, wanted, weights, held)
        # Of several at once all may be in each other's way; of one alone that is rounding.
        most = len(atoms) if bool((weights != before).any()) else int(len(new) > 1)
    return weights.to(atoms)


def _within(atoms: Tensor, wanted: Tensor, weights: Tensor, held: Tensor) -> Tensor:
    """The best weights on ``held`` (M,), reached from ``weights``; where negative it is let go."""
    rows = held.nonzero().flatten()
    chosen = atoms[rows].double()
    products = chosen @ chosen.T
    products.diagonal().add_(_RIDGE)
    at, kept = weights[rows], torch.ones_like(rows, dtype=torch.bool)
    while bool(kept.any()):
        factor = torch.linalg.cholesky(products[kept][:, kept])
        best = torch.zeros_like(at)
        best[kept] = torch.cholesky_solve(wanted[rows[kept], None], factor).flatten()
        low = kept & (best <= 0)
        if not bool(low.any()):
            at = best
            break
        part = at / (at - best).clamp_min(1e-300)  # of the way, until one is zero
        at = at + part[low].amin() * (best - at)
        at[low & (part <= part[low].amin())] = 0
        kept &= ~(low & (at <= 0))
    return torch.zeros_like(weights).index_put_((rows,), at)


def parts(atoms: Tensor, target: Tensor) -> Tensor:
    """How much each gradient seems to be a part of the sum: (M,), the higher the more.

    Args:
        atoms: Gradients (M, k) at unit length.
        target: The sum (k,), of any length.
    """
    target = target / target.norm().clamp_min(1e-30)
    # Most weights are zero; among those the inner product decides.
    return nonnegative(atoms, target) + _TIE * (atoms @ target)


def best(atoms: Tensor, target: Tensor, count: int) -> Tensor:
    """The ``count`` gradients that are the greatest parts, int64; of few, some more than once.

    Sought among the :data:`SHORTLIST` that alone fit best.

    Args:
        atoms, target: As of :func:`parts`.
        count: How many.
    """
    likely = (atoms @ target).topk(min(SHORTLIST, len(atoms))).indices
    order = parts(atoms[likely], target).argsort(descending=True, stable=True)
    return likely[order][torch.arange(count) % len(likely)]
