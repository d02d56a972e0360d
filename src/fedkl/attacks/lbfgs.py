"""L-BFGS for many independent problems at once."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class BatchedLBFGS:
    """The steps of :class:`torch.optim.LBFGS` without line search, for N problems side by side.

    Every row is a problem of its own with its own curvature history: one row gives what
    ``torch.optim.LBFGS(lr, max_iter=..., history_size=...)`` gives. One evaluation a step.

    Args:
        size: (N, n): problems, unknowns each.
        lr: Step length.
        history: Pairs kept per problem.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        lr: float = 1.0,
        history: int = 100,
        like: Tensor,
    ) -> None:
        self.lr = lr
        count = size[0]
        # (s, y, 1/sᵀy) per step; 1/sᵀy = 0 makes the two loops pass a problem's pair over.
        self.pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=history)
        self.diagonal = like.new_ones(count)
        self.direction: Tensor | None = None
        self.gradient: Tensor | None = None
        self.step_length = like.new_zeros(count)
        self.fresh = torch.ones(count, dtype=torch.bool, device=like.device)

    def restart(self, rows: Tensor) -> None:
        """Forgets the history of ``rows`` (bool (N,))."""
        self.fresh |= rows
        for _, _, rho in self.pairs:
            rho[rows] = 0
        self.diagonal[rows] = 1

    def step(self, gradient: Tensor) -> Tensor:
        """The change (N, n) to add to the unknowns, from the gradient (N, n) where they are."""
        if self.direction is None or self.gradient is None:
            direction = -gradient
        else:
            self._remember(gradient)
            direction = self._two_loops(gradient)
        direction = torch.where(self.fresh[:, None], -gradient, direction)
        first = (self.lr / gradient.abs().sum(dim=1)).clamp_max(self.lr)
        self.step_length = torch.where(self.fresh, first, torch.full_like(first, self.lr))
        # A problem that was just put somewhere new has no gradient there yet.
        self.fresh = self.fresh & (gradient == 0).all(dim=1)
        self.direction, self.gradient = direction, gradient.clone()
        return direction * self.step_length[:, None]

    def _remember(self, gradient: Tensor) -> None:
        assert self.direction is not None
        assert self.gradient is not None
        y = gradient - self.gradient
        s = self.direction * self.step_length[:, None]
        curvature = (y * s).sum(dim=1)
        good = (curvature > 1e-10) & ~self.fresh
        rho = torch.where(good, 1 / torch.where(good, curvature, 1.0), 0.0)
        self.diagonal = torch.where(
            good, curvature / (y * y).sum(dim=1).clamp_min(1e-30), self.diagonal
        )
        # A pair that was never finite must not come back as 0 * inf.
        keep = good[:, None]
        self.pairs.append((torch.where(keep, s, 0.0), torch.where(keep, y, 0.0), rho))

    def _two_loops(self, gradient: Tensor) -> Tensor:
        q = -gradient
        alphas = []
        for s, y, rho in reversed(self.pairs):
            alpha = (s * q).sum(dim=1) * rho
            q = q - alpha[:, None] * y
            alphas.append(alpha)
        r = q * self.diagonal[:, None]
        for (s, y, rho), alpha in zip(self.pairs, reversed(alphas), strict=True):
            beta = (y * r).sum(dim=1) * rho
            r = r + s * (alpha - beta)[:, None]
        return r
