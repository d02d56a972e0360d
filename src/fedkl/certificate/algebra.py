"""What is left of one Jacobian beside another, over T updates that share their secrets."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Leftover:
    """Singular values of J_x once J_s may cancel what it can, for a growing number of updates.

    With E = (J_s J_sᵀ/ridge² + I)^{-1/2} J_x its singular values are those of J_x projected on the
    complement of range(J_s), except that a cancellation counts only as far as it costs: a secret
    that moves by d leaves ridge·d behind. J_x is block diagonal (every update has images of its
    own), J_s is one block above the other.

    The secrets are eliminated by Householder reflections, one update after the other; forming
    J_sᵀ J_s would square the condition number. Only the small remainder is multiplied with itself.

    Args:
        secrets: Number of columns of J_s.
        ridge: As above, positive.
    """

    def __init__(self, secrets: int, ridge: float) -> None:
        self._triangle = ridge * torch.eye(secrets, dtype=torch.float64)
        self._carried = torch.zeros(secrets, 0, dtype=torch.float64)
        self._gram = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, by_secrets: Tensor, by_inputs: Tensor) -> None:
        """One more update: J_s (values, secrets) and J_x (values, inputs)."""
        secrets, before = self._carried.shape
        inputs = by_inputs.shape[1]
        right = by_inputs.new_zeros(secrets + len(by_inputs), before + inputs)
        right[:secrets, :before] = self._carried
        right[secrets:, before:] = by_inputs
        if secrets:
            factors, tau = torch.geqrf(torch.cat([self._triangle, by_secrets]))
            right = torch.ormqr(factors, tau, right, transpose=True)
            self._triangle = factors[:secrets].triu()
            self._carried = right[:secrets]
        else:
            self._carried = right[:0]
        left = right[secrets:]
        grown = left.T @ left
        grown[:before, :before] += self._gram
        self._gram = grown

    def spectrum(self) -> Tensor:
        """Singular values, descending: (updates · inputs,)."""
        values = torch.linalg.eigvalsh(self._gram)
        found: Tensor = values.clamp_min(0.0).sqrt().flip(0)
        return found


class Information:
    """Mutual information of images and observation, linear and Gaussian, over T updates.

    ½·log det(I + J_x J_xᵀ (J_s J_sᵀ + noise² I)⁻¹), the columns of J_x and J_s multiplied by
    prior deviations. Determinants of sums are taken apart so that no matrix is larger than one
    update's images or the secrets: with A = I + J_x J_xᵀ/noise², block diagonal, the numerator is
    det A · det(I + J_sᵀ A⁻¹ J_s/noise²).

    Every determinant is that of a triangle of Householder reflections. Products of a Jacobian with
    itself have the square of its condition, and what noise of 1e-8 leaves is far below their
    rounding; so is the difference between what the secrets do and what images explain of it.

    Args:
        secrets: Number of columns of J_s.
        noise: Standard deviation of every observed number, positive.
    """

    def __init__(self, secrets: int, noise: float) -> None:
        self.noise = noise
        # Below the line: what is learned of the secrets when the images are known; above: when not.
        self._below = torch.eye(secrets, dtype=torch.float64)
        self._above = torch.eye(secrets, dtype=torch.float64)
        self._own = 0.0

    def add(self, by_secrets: Tensor, by_inputs: Tensor) -> None:
        """One more update: scaled J_s (values, secrets) and scaled J_x (values, inputs)."""
        s, x = by_secrets / self.noise, by_inputs / self.noise
        inputs = x.shape[1]
        factors, tau = torch.geqrf(torch.cat([x, torch.eye(inputs, dtype=x.dtype)]))
        self._own += _logdet(factors)
        if not s.shape[1]:
            return
        # Rotated, the first rows of (s, 0) are what images explain; the rest is A^(-1/2) s.
        padded = torch.cat([s, s.new_zeros(inputs, s.shape[1])])
        left = torch.ormqr(factors, tau, padded, transpose=True)[inputs:]
        self._below = _stacked(self._below, s)
        self._above = _stacked(self._above, left)

    def bits(self) -> float:
        """Bits about all images together when the secrets are unknown."""
        return (self._own + _logdet(self._above) - _logdet(self._below)) / (2 * math.log(2))

    def bits_known(self) -> float:
        """The same when the secrets are known."""
        return self._own / (2 * math.log(2))


def compressed(by_secrets: Tensor, by_inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The same two Jacobians in fewer rows: a rotation of the observation changes nothing."""
    width = by_secrets.shape[1]
    both = torch.cat([by_secrets, by_inputs], dim=1)
    if both.shape[0] > both.shape[1]:
        both = torch.geqrf(both)[0][: both.shape[1]].triu()
    return both[:, :width], both[:, width:]


def _stacked(triangle: Tensor, rows: Tensor) -> Tensor:
    """The triangle R with RᵀR = triangleᵀ·triangle + rowsᵀ·rows."""
    both = torch.geqrf(torch.cat([rows, triangle]))[0]  # large rows first: they round the others
    return both[: len(triangle)].triu()


def _logdet(triangle: Tensor) -> float:
    """log det RᵀR."""
    return 2 * float(triangle.diagonal().abs().log().sum())
