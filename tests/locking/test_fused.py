"""Batch norm and pad in one, against one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedkl.key import Key
from fedkl.locking import fused as module
from fedkl.locking import lock
from fedkl.rng import derive

KEY = Key.generate()
SIZES = {
    "plain": (5, 2, 3, 4),
    "vectors": (5, 6),
    "signals": (4, 3, 7),
    "volumes": (3, 2, 2, 3, 2),
    "large": (3, 8, 32, 33),  # summed image by image
}
NORMS: dict[int, Callable[..., nn.Module]] = {
    2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d
}  # fmt: skip


def locked(size: tuple[int, ...], **settings: object) -> tuple[nn.Module, Tensor]:
    x = 2 * torch.randn(size, generator=derive(0, "x")) + 1
    model = nn.Sequential(NORMS[len(size)](size[1], **settings), nn.Flatten(), nn.LazyLinear(3))
    model(x)
    # On the input itself, for once: the norm is the whole stem.
    scheme = {"scheme": "pad", "layers": "0", "head": False, "example": x}
    with pytest.warns(UserWarning, match="nothing secret"):
        return lock(model, KEY, **scheme), x


def results(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, *, at_once: bool
) -> list[Tensor]:
    """Output, gradients, and statistics."""
    norm = model[0]  # type: ignore[index]
    norm.reset_running_stats()
    called = []

    def apply(*args: object) -> Tensor:
        called.append(1)
        out: Tensor = module._Fused.apply(*args)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(module, "_fuse", apply)
        if not at_once:
            patch.setattr(module, "_FUSED", ())
        x = x.clone().requires_grad_()
        out = norm(x)
        weights = torch.randn(out.shape, generator=derive(0, "weights"))
        inputs = [x, norm.keylock.scale_learned, norm.keylock.shift_learned]
        grads = torch.autograd.grad((out * weights).sum(), inputs)
    assert bool(called) == at_once
    return [out.detach(), *grads, *(b.clone() for b in norm.buffers(recurse=False))]


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.3, "eps": 0.1}])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_computes_the_same(
    size: tuple[int, ...], settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = locked(size, **settings)
    ours = results(model, x, monkeypatch, at_once=True)
    theirs = results(model, x, monkeypatch, at_once=False)
    assert len(ours) == len(theirs) == 7
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_without_running_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = locked(SIZES["plain"], track_running_stats=False)
    ours = results(model, x, monkeypatch, at_once=True)
    theirs = results(model, x, monkeypatch, at_once=False)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", ["plain", "large"])
def test_second_derivatives(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gradient matching takes: the gradient of a distance between gradients."""
    model, x = locked(SIZES[size])
    found = []
    for kinds in (module._FUSED, ()):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_FUSED", kinds)
            image = x.clone().requires_grad_()
            parameters = [p for p in model.parameters() if p.requires_grad]
            loss = model(image).square().mean()
            grads = torch.autograd.grad(loss, [image, *parameters], create_graph=True)
            total = torch.stack([g.square().sum() for g in grads]).sum()
            found.append(torch.autograd.grad(total, [image, *parameters]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_hooks_of_the_input_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a graph of the gradients is asked for."""
    model, x = locked(SIZES["plain"])
    norm = model[0]  # type: ignore[index]
    found = []
    for kinds in (module._FUSED, ()):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_FUSED", kinds)
            image = x.clone().requires_grad_()
            inner = image * 2
            inner.register_hook(lambda grad: 3 * grad)
            inner.retain_grad()
            loss = norm(inner).square().sum()
            found.append(torch.autograd.grad(loss, [image], create_graph=True)[0].detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_where_it_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eval mode, no gradients, other dtypes and layouts, cumulative statistics, transforms."""
    model, x = locked(SIZES["plain"])
    untracked = locked(SIZES["plain"], track_running_stats=False)[0][0]  # type: ignore[index]

    def refuse(*args: object) -> Tensor:
        raise AssertionError("fused")

    monkeypatch.setattr(module, "_fuse", refuse)
    norm = model[0]  # type: ignore[index]
    with pytest.raises(AssertionError, match="fused"):
        norm(x)
    norm(x.to(memory_format=torch.channels_last))
    torch.func.grad(lambda t: untracked(t).square().sum())(x)
    with torch.no_grad():
        norm(x)
    norm.momentum = None
    norm(x)
    norm.momentum = 0.1
    norm.double()(x.double())
    norm.float().eval()(x)


def test_one_number_per_channel_is_refused_as_ever() -> None:
    model, x = locked(SIZES["vectors"])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(x[:1])
