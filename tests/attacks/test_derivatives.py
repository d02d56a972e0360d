"""Second derivatives that are written out, against torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.functional import batch_norm, conv2d

from fedkl.attacks.derivatives import TwiceDifferentiable
from fedkl.rng import derive

TRIALS = 3

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
CASES: dict[str, Case] = {
    "batch norm of one image": (lambda: own(nn.BatchNorm2d(4)), (1, 4, 5, 6)),
    "batch norm of three": (lambda: own(nn.BatchNorm2d(4)), (3, 4, 5, 6)),
    "batch norm without affine": (lambda: own(nn.BatchNorm2d(4, affine=False)), (2, 4, 3, 3)),
    "batch norm of vectors": (lambda: own(nn.BatchNorm1d(4)), (5, 4)),
    "batch norm of volumes, large eps": (lambda: own(nn.BatchNorm3d(2, eps=0.5)), (1, 2, 3, 2, 4)),
    "convolution": (lambda: nn.Conv2d(4, 3, 3), (2, 4, 6, 6)),
    "strides and padding": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), (1, 4, 6, 7)),
    "groups and dilation": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2, bias=False),
        (1, 4, 6, 6),
    ),
    "convolution in one dimension": (lambda: nn.Conv1d(4, 3, 3, padding=1), (2, 4, 8)),
    "convolution in three": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 3)),
    "padding by name": (lambda: nn.Conv2d(4, 3, 3, padding="same"), (1, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), (1, 4, 3, 3)),
    "several": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, bias=False), own(nn.BatchNorm2d(6)), nn.Sigmoid(), nn.Conv2d(6, 2, 3)
        ),
        (2, 4, 7, 7),
    ),
}  # fmt: skip


def own(norm: Any) -> nn.Module:
    """A norm with γ and β of no particular kind that always takes the batch's statistics."""
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    if norm.affine:
        nn.init.normal_(norm.weight, generator=derive(0, "gamma"))
        nn.init.normal_(norm.bias, generator=derive(0, "beta"))
    module: nn.Module = norm
    return module


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    make, shape = CASES[request.param]
    torch.manual_seed(0)
    model = make().double()
    return model, torch.randn(TRIALS, *shape, generator=derive(0, "x"), dtype=torch.float64)


def sent(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Gradient of a scalar that nothing about is linear."""

    def loss(at: dict[str, Tensor]) -> Tensor:
        y = functional_call(model, at, (x,))
        return (y.square() * y.detach().cos() + y.sin()).sum()

    return dict(grad(loss)(parameters))


def matched(model: nn.Module, steps: int) -> Callable[[Tensor], Tensor]:
    """Size of what ``steps`` of gradient descent change, as a function of images."""
    start = {n: p.detach() for n, p in model.named_parameters()}

    def size(x: Tensor) -> Tensor:
        now = start
        for _ in range(steps):
            now = {n: now[n] - 0.01 * g for n, g in sent(model, now, x).items()}
        change = sum((now[n] - start[n]).sin().sum() for n in now) if now else x.sum()
        return torch.as_tensor(change)

    return size


@pytest.mark.parametrize("steps", [1, 3])
def test_as_torch_under_vmap(case: tuple[nn.Module, Tensor], steps: int) -> None:
    model, x = case
    size = matched(model, steps)
    wanted = vmap(grad(size))(x)
    with TwiceDifferentiable():
        found = vmap(grad(size))(x)
        leaf = x.clone().requires_grad_()
        (outside,) = torch.autograd.grad(vmap(size)(leaf).sum(), leaf)
    for mine in (found, outside):
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-9)


def test_as_torch_alone(case: tuple[nn.Module, Tensor]) -> None:
    """Every derivative that may be asked for, among them of the second kind by parameters."""
    model, x = case

    def derivatives() -> list[Tensor]:
        leaf = x[0].clone().requires_grad_()
        parameters = list(model.parameters())
        y = model(leaf)
        first = torch.autograd.grad(y.sin().sum(), [leaf, *parameters], create_graph=True)
        size = torch.stack([g.cos().sum() for g in first]).sum()
        second = torch.autograd.grad(size, [leaf, *parameters], materialize_grads=True)
        return [y, *first, *second]

    wanted = derivatives()
    with TwiceDifferentiable():
        found = derivatives()
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("batched", ["x", "w", "b", "xw", "xwb"])
def test_whatever_is_batched(batched: str) -> None:
    generator = derive(0, "operands")
    shapes = {"x": (2, 4, 6, 6), "w": (4, 2, 3, 3), "b": (4,)}
    given = {
        n: torch.randn((TRIALS, *s) if n in batched else s, generator=generator).double()
        for n, s in shapes.items()
    }

    def size(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        def loss(w: Tensor, b: Tensor) -> Tensor:
            return conv2d(x, w, b, padding=1, groups=2).sin().sum()

        return torch.stack([g.sin().sum() for g in grad(loss, argnums=(0, 1))(w, b)]).sum()

    dims = tuple(0 if n in batched else None for n in shapes)
    every = vmap(grad(size, argnums=(0, 1, 2)), in_dims=dims)
    wanted = every(*given.values())
    with TwiceDifferentiable():
        found = every(*given.values())
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_only_what_is_differentiated_twice_is_ours() -> None:
    x = torch.randn(2, 3, 4, 4, generator=derive(0, "x"))
    mean, variance = torch.zeros(3), torch.ones(3)
    with TwiceDifferentiable():
        y = batch_norm(x, mean, variance, training=True)  # moves running statistics
        torch.testing.assert_close(batch_norm(x, mean, variance), x, atol=1, rtol=1)
        with pytest.raises(ValueError, match="more than 1 value"):
            batch_norm(x[:1, :, 0, 0], None, None, training=True)
        assert conv2d(x[0], torch.ones(1, 3, 1, 1)).shape == (1, 4, 4)  # one image, no batch
    assert bool((mean != 0).all())
    torch.testing.assert_close(y, batch_norm(x, None, None, training=True))


@pytest.mark.parametrize(
    "function", [lambda x: own(nn.BatchNorm2d(3)).double()(x), lambda x: conv2d(x, x[:, :, :2, :2])]
)
def test_third_derivatives(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 3, 4, 4, generator=derive(0, "x"), dtype=torch.float64).requires_grad_()

    def second(x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.sin().sum(), x, create_graph=True)[0]

    with TwiceDifferentiable():
        assert torch.autograd.gradcheck(second, (x,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, on import
def test_forward_mode_is_refused() -> None:
    x, w = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2)
    with TwiceDifferentiable(), pytest.raises(NotImplementedError, match="jvp"):
        jvp(lambda t: conv2d(t, w), (x,), (x,))
