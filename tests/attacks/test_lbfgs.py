"""Batched L-BFGS is torch's, problem by problem."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedkl.attacks.lbfgs import BatchedLBFGS
from fedkl.rng import derive


def rosenbrock(x: Tensor) -> Tensor:
    """(..., n) to (...)."""
    return ((1 - x[..., :-1]) ** 2 + 10 * (x[..., 1:] - x[..., :-1] ** 2) ** 2).sum(dim=-1)


def quadratic(x: Tensor) -> Tensor:
    """Badly scaled, but convex."""
    scale = torch.logspace(0, 2, x.shape[-1], dtype=x.dtype)
    return (scale * (x - 0.3) ** 2).sum(dim=-1)


def by_torch(start: Tensor, function: object, steps: int, history: int) -> Tensor:
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x],
        lr=0.5,
        max_iter=steps,
        max_eval=10**6,
        history_size=history,
        tolerance_grad=0,
        tolerance_change=0,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = function(x)  # type: ignore[operator]
        loss.backward()
        return loss

    optimizer.step(closure)
    return x.detach()


@pytest.mark.parametrize("function", [quadratic, rosenbrock])
@pytest.mark.parametrize("history", [3, 100])
def test_every_row_is_torchs_lbfgs(function: object, history: int) -> None:
    start = 0.3 * torch.randn(3, 6, generator=derive(0, "start"), dtype=torch.float64)
    x, steps = start.clone(), 12
    solver = BatchedLBFGS((3, 6), lr=0.5, history=history, like=x)
    for _ in range(steps):
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(y).sum(), y)  # type: ignore[operator]
        x = x + solver.step(gradient)
    for row in range(3):
        torch.testing.assert_close(
            x[row], by_torch(start[row], function, steps, history), rtol=1e-7, atol=1e-9
        )


def test_restarted_row_begins_anew_and_leaves_the_others_alone() -> None:
    start = torch.randn(2, 4, generator=derive(1, "start"), dtype=torch.float64)

    def go(x: Tensor, solver: BatchedLBFGS, steps: int) -> Tensor:
        for _ in range(steps):
            y = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(quadratic(y).sum(), y)
            x = x + solver.step(gradient)
        return x

    solver = BatchedLBFGS((2, 4), lr=0.5, like=start)
    x = go(start.clone(), solver, 5)
    x[0] = start[0]
    solver.restart(torch.tensor([True, False]))
    restarted = go(x, solver, 5)
    once = go(start.clone(), BatchedLBFGS((2, 4), lr=0.5, like=start), 10)
    first = go(start.clone(), BatchedLBFGS((2, 4), lr=0.5, like=start), 5)
    torch.testing.assert_close(restarted[0], first[0])
    torch.testing.assert_close(restarted[1], once[1])
