"""γ and β per position: the form that the compiler gets computes what the plain one does."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

from fedkl.errors import LockError
from fedkl.key import Key
from fedkl.locking import lock, sources_of
from fedkl.locking import positions as module
from fedkl.locking.positions import _STAGE, _ChannelsLast
from fedkl.rng import derive

KEY = Key._of("seed", bytes(range(32)))
PLAIN = torch.addcmul


def turned(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    out: Tensor = _ChannelsLast.apply(x, scale, shift)  # type: ignore[no-untyped-call]
    return out


def tensors(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = derive(count, "positions")
    shapes = ((count, 3, 4, 2), (3, 4, 2), (3, 4, 2))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )


def batch(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=derive(count, "x"))


def padded(example: Tensor, model: nn.Module | None = None, layers: str = "all") -> nn.Module:
    locked = lock(model or net(), KEY, scheme="pad", layers=layers, example=example)
    with torch.no_grad():
        for source in sources_of(locked).values():
            for p in source.parameters():
                p.copy_(0.1 * torch.randn(p.shape, generator=derive(0, "learned")))
    return locked


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("count", [1, 5, _STAGE, 2 * _STAGE, 3 * _STAGE + 1])
def test_values_and_gradients_are_those_of_addcmul(count: int) -> None:
    got, want = tensors(count), tensors(count)
    weights = torch.randn(count, 3, 4, 2, generator=derive(9, "w"), dtype=torch.float64)
    outputs = turned(*got), PLAIN(want[2], want[0], want[1])
    torch.testing.assert_close(*outputs)
    for output in outputs:
        (output * weights).sum().backward()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("count", [1, 2 * _STAGE])
def test_first_and_second_derivatives(count: int) -> None:
    assert gradcheck(turned, tensors(count))
    assert gradgradcheck(turned, tensors(count))


def test_gradients_keep_their_dtypes() -> None:
    x, scale, shift = tensors(4, torch.float32)
    half = x.detach().bfloat16().requires_grad_()
    out = turned(half, scale, shift)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    assert scale.grad is not None
    assert scale.grad.dtype == torch.float32


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_model_takes_batches_of_any_size() -> None:
    plain = padded(batch(2))
    inner = copy.deepcopy(plain)
    compiled = torch.compile(inner, backend="aot_eager", fullgraph=True)
    for count in (16, 7, 24):
        for model in (plain, compiled):
            model.zero_grad()
            model(batch(count)).square().sum().backward()
        for (name, p), q in zip(plain.named_parameters(), inner.parameters(), strict=True):
            assert p.grad is not None
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_gradients_per_example() -> None:
    model = padded(batch(2))
    values = {n: p.detach() for n, p in model.named_parameters()}

    def loss(given: dict[str, Tensor], one: Tensor) -> Tensor:
        out: Tensor = functional_call(model, given, one[None])
        return out.square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))
    want = each(values, batch(3))
    got = torch.compile(each, backend="aot_eager")(values, batch(3))
    for name in values:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_under_autocast() -> None:
    model = padded(batch(2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = model(batch(4)), compiled(batch(4))
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.2)
    got.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Last(nn.Module):
    """A layer norm over the last axis of (N, H, W, C), as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) as (N, H', W', 2)."""
        out: Tensor = self.head(self.norm(self.conv(x).permute(0, 2, 3, 1)))
        return out


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("model, layers, expected", [(Last(), "norm", 0), (net(), "1", 1)])
def test_only_a_compiler_and_only_channels_first_take_that_form(
    model: nn.Module, layers: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, seen = padded(batch(2), model, layers), []

    def watch(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(n for n in graph.graph.nodes if "autograd_function" in str(n.target))
        return graph

    torch.compile(locked, backend=watch, fullgraph=True)(batch(2))
    assert len(seen) == expected
    monkeypatch.setattr(module, "_ChannelsLast", None)  # whoever uses it now fails
    locked(batch(2))


@pytest.mark.parametrize("shape", [(4, 3, 9, 9), (4, 3, 7, 8)])
def test_another_size_raises_from_no_frame_that_has_the_pad(shape: tuple[int, ...]) -> None:
    model = padded(batch(4))
    with pytest.raises(LockError, match="one scale per position") as caught:
        model(torch.rand(shape))
    sizes = {source.shape for source in sources_of(model).values()}
    for frame, _ in traceback.walk_tb(caught.value.__traceback__):
        held = [v for v in frame.f_locals.values() if isinstance(v, Tensor)]
        assert not any(t.shape in sizes for t in held), frame.f_code.co_name
