"""Which of given gradients an update of several images is the sum of."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

ITERATIONS: Final = 300
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
    step = 1 / _largest(atoms).clamp_min(1e-30)
    momentum = 1.0
    for _ in range(iterations):
        slope = atoms @ (target - ahead @ atoms)
        new = (ahead + step * slope).clamp_min(0)
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / grown * (new - weights)
        weights, momentum = new, grown
    return weights


def _largest(atoms: Tensor) -> Tensor:
    """A little more than the largest eigenvalue of atoms·atomsᵀ, by power iteration."""
    vector = torch.ones(len(atoms), dtype=atoms.dtype)
    value = vector.new_zeros(())
    for _ in range(_POWERS):
        vector = vector / vector.norm().clamp_min(1e-30)
        vector = atoms @ (vector @ atoms)
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
