"""Which of given gradients an update of several images is the sum of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

ITERATIONS: Final = 300
SHORTLIST: Final = 500
_POWERS: Final = 30
_TIE: Final = 1e-6


def nonnegative(atoms: Tensor, target: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Weights w of 0 or more that minimize ‖target − Σ w·atoms‖², nearly.

    By projected gradient steps with Nesterov's momentum (Beck and Teboulle 2009) from zero. Of
    thousands of atoms that takes seconds, active sets (``scipy.optimize.nnls``) minutes; where
    atoms are more than equations it stops at small weights.

    Args:
        atoms: (M, k).
        target: (k,).
        iterations: Steps.

    Returns:
        (M,).
    """
    weights = ahead = torch.zeros(len(atoms), dtype=atoms.dtype)
    wanted = atoms @ target
    products = atoms @ atoms.T if len(atoms) < atoms.shape[1] else None  # whichever is smaller

    def explained(w: Tensor) -> Tensor:
        return atoms @ (w @ atoms) if products is None else products @ w

    step = 1 / _largest(explained, torch.ones_like(weights)).clamp_min(1e-30)
    momentum = 1.0
    for _ in range(iterations):
        slope = wanted - explained(ahead)
        new = (ahead + step * slope).clamp_min(0)
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / grown * (new - weights)
        weights, momentum = new, grown
    return weights


def _largest(apply: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """A little more than the largest eigenvalue, by power iteration from ``vector``."""
    value = vector.new_zeros(())
    for _ in range(_POWERS):
        vector = apply(vector / vector.norm().clamp_min(1e-30))
        value = vector.norm()
    return 1.1 * value


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
