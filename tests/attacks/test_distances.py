"""Distances of gradients against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch.func import grad, vmap

from fedkl.attacks.distances import DISTANCES, cosine, grnn, squared, wasserstein
from fedkl.rng import derive


@pytest.fixture
def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = derive(0, "pairs")
    shapes = [(3, 4), (5,), (2, 2, 2)]
    return [
        (torch.randn(s, generator=generator), torch.randn(s, generator=generator)) for s in shapes
    ]


def flat(pairs: list[tuple[torch.Tensor, torch.Tensor]], side: int) -> np.ndarray:
    return torch.cat([pair[side].flatten() for pair in pairs]).double().numpy()


def test_squared(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    expected = ((flat(pairs, 0) - flat(pairs, 1)) ** 2).sum()
    assert float(squared(pairs)) == pytest.approx(expected, rel=1e-5)


def test_cosine(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    a, b = flat(pairs, 0), flat(pairs, 1)
    expected = 1 - a @ b / math.sqrt((a @ a) * (b @ b))
    assert float(cosine(pairs)) == pytest.approx(expected, rel=1e-5)


def test_wasserstein_is_scipys(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    expected = wasserstein_distance(flat(pairs, 0), flat(pairs, 1))
    assert float(wasserstein(pairs)) == pytest.approx(expected, rel=1e-5)
    assert float(grnn(pairs)) == pytest.approx(float(squared(pairs)) + expected, rel=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
def test_zero_where_they_agree_and_with_a_derivative_everywhere(name: str) -> None:
    seen = torch.randn(6, generator=derive(1, "seen"))
    assert float(DISTANCES[name]([(seen, seen)])) == pytest.approx(0, abs=1e-6)
    zero = torch.zeros(6, requires_grad=True)
    (gradient,) = torch.autograd.grad(DISTANCES[name]([(zero, seen)]), zero)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("near", [0.0, 1e-4, 1.0])
def test_derivative_of_cosine(near: float) -> None:
    generator = derive(2, "near")
    shapes = [(3, 4), (5,)]
    seen = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    made = [
        (2 * s + near * torch.randn(s.shape, generator=generator)).requires_grad_() for s in seen
    ]

    def reference(*tensors: torch.Tensor) -> torch.Tensor:
        whole, other = (torch.cat([t.flatten() for t in side]) for side in (tensors, seen))
        return 0.5 * (whole / whole.norm() - other / other.norm()).square().sum()

    def value(*tensors: torch.Tensor) -> torch.Tensor:
        return cosine(list(zip(tensors, seen, strict=True)))

    wanted = torch.autograd.grad(reference(*made), made)
    for found in (
        torch.autograd.grad(value(*made), made),
        [g[0] for g in vmap(grad(value, argnums=(0, 1)))(*(m.detach()[None] for m in made))],
    ):
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-17, 1e-12, 1e-6, 1.0, 1e6, 1e17])
def test_cosine_knows_no_scale(
    scale: float, pairs: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    wanted = float(cosine(pairs))
    for scaled in ([(scale * m, s) for m, s in pairs], [(m, scale * s) for m, s in pairs]):
        made = [m.requires_grad_() for m, _ in scaled]
        value = cosine(scaled)
        assert float(value.detach()) == pytest.approx(wanted, rel=1e-5)
        whole = torch.cat([g.double().flatten() for g in torch.autograd.grad(value, made)])
        # At a fixed length there is nothing to gain along the gradient itself.
        along = torch.cat([m.detach().double().flatten() for m in made])
        assert abs(float(whole @ along / (whole.norm() * along.norm()))) < 1e-4


def test_a_gradient_without_a_direction_is_no_match() -> None:
    seen = torch.randn(6, generator=derive(1, "seen"))
    for nothing in (torch.zeros(6), 1e-25 * seen):
        assert float(cosine([(nothing, seen)])) == 1
    assert math.isnan(float(cosine([(1e30 * seen, seen)])))
    made = torch.stack([torch.zeros(6), seen, -seen]).requires_grad_()
    losses = vmap(lambda m: cosine([(m, seen)]))(made)
    torch.testing.assert_close(losses, torch.tensor([1.0, 0.0, 2.0]), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(losses.sum(), made)
    assert bool((gradient[0] == 0).all())
    assert bool(gradient.isfinite().all())
