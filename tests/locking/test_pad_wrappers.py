"""A model locked with pads under torch.compile, torch.func, autocast, other dtypes and layouts."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fedkl.errors import LockError
from fedkl.key import Key
from fedkl.locking import (
    affines,
    epoch_of,
    lock,
    renew,
    set_key,
    shared_state,
    sources_of,
    unlock,
)

from .zoo import IMAGE, SMALL

KEY = Key.generate()
KINDS = ["batch", "group", "instance", "layer", "no norm", "rms"]


def locked(kind: str, **settings: object) -> nn.Module:
    factory, example = SMALL[kind]
    return lock(factory(), KEY, scheme="pad", example=example, **settings)  # type: ignore[arg-type]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("learned", ["position", "none"])
@pytest.mark.parametrize("kind", ["batch", "group", "no norm", "rms"])
def test_compile_gives_the_same_outputs_and_gradients(kind: str, learned: str) -> None:
    plain = locked(kind, learned=learned)
    inner = copy.deepcopy(plain)
    compiled = torch.compile(inner, backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        plain.train(mode)
        inner.train(mode)
        a, b = plain(IMAGE), compiled(IMAGE)
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        (a**2).sum().backward()
        (b**2).sum().backward()
    gradients = {n: p.grad for n, p in inner.named_parameters()}
    for name, p in plain.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_model_hears_a_renewed_pad() -> None:
    model = locked("batch").eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first = compiled(IMAGE)
    for epoch in range(1, 12):  # more often than torch would compile anew
        renew(model, KEY, epoch)
        torch.testing.assert_close(compiled(IMAGE), model(IMAGE))
    assert not torch.allclose(compiled(IMAGE), first)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("train", [False, True])
def test_a_compiled_average_refuses_a_pad_that_is_not_of_its_number(
    train: bool, backend: str
) -> None:
    model = locked("batch").train(train)
    renew(model, KEY, 2)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True).train(
        train
    )
    run = torch.compile(ema.module, backend=backend, fullgraph=True)
    run(IMAGE)
    ema.update_parameters(model)
    run(IMAGE)
    renew(model, KEY, 8)
    ema.update_parameters(model)
    with pytest.raises((LockError, RuntimeError), match="of one epoch, and its private state"):
        run(IMAGE)
    renew(ema.module, KEY, 9)
    torch.testing.assert_close(run(IMAGE), copy.deepcopy(ema.module)(IMAGE))


@pytest.mark.filterwarnings("ignore", "error:.*to a Python integer")
def test_a_trace_does_not_ask_which_pad_it_is() -> None:
    model = locked("batch").eval()
    renew(model, KEY, 2)
    traced = torch.jit.trace(model, IMAGE)  # type: ignore[no-untyped-call]
    assert torch.equal(traced(IMAGE), model(IMAGE))


def test_functional_call_takes_other_learned_terms() -> None:
    model = locked("batch").eval()
    zero = {n: torch.zeros_like(p) for n, p in model.named_parameters() if "_learned" in n}
    ones = {n: torch.ones_like(t) for n, t in zero.items()}
    assert torch.equal(functional_call(model, zero, IMAGE), model(IMAGE))
    assert not torch.equal(functional_call(model, ones, IMAGE), model(IMAGE))


def test_vmap_over_examples_gives_gradients_per_example() -> None:
    model = locked("group").eval()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, values, x[None])
        return out.square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, IMAGE)
    total = grad(lambda v: functional_call(model, v, IMAGE).square().sum())(parameters)
    for name, value in total.items():
        torch.testing.assert_close(each[name].sum(0), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_pad_stays_float32_under_autocast(kind: str) -> None:
    model = locked(kind).train()
    seen = []
    norm = next(m for m in model.modules() if "keylock" in m._modules)
    norm.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(IMAGE)
        assert all(
            t.dtype == torch.float32
            for s in sources_of(model).values()
            for t in (s.scale(), s.shift())
        )
    torch.testing.assert_close(out.float(), copy.deepcopy(model)(IMAGE), rtol=0.3, atol=0.5)
    out.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert seen[0] == (torch.bfloat16, torch.bfloat16) or kind == "rms"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pad_moves_with_the_model(kind: str, dtype: torch.dtype) -> None:
    model = locked(kind)
    gamma = next(iter(affines(model).values()))[0]
    model.to(dtype)
    moved = next(iter(affines(model).values()))[0]
    assert moved.dtype == dtype
    torch.testing.assert_close(moved.float(), gamma, rtol=0.01, atol=0.01)
    assert model(IMAGE.to(dtype)).dtype == dtype
    set_key(model, KEY)
    assert torch.equal(next(iter(affines(model).values()))[0], gamma.to(dtype))
    assert {p.dtype for p in unlock(model).parameters()} == {dtype}


def test_channels_last_computes_the_same() -> None:
    model = locked("batch").eval()
    want = model(IMAGE)
    model.to(memory_format=torch.channels_last)
    got = model(IMAGE.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_hooks_and_identity_survive_and_ours_goes_with_the_lock() -> None:
    factory, example = SMALL["batch"]
    model = factory()
    calls: list[int] = []
    model[1].register_forward_hook(lambda *_: calls.append(1))  # type: ignore[index]
    inner = copy.deepcopy(lock(model, KEY, scheme="pad", example=example))
    calls.clear()
    inner(IMAGE)
    assert calls == [1]
    assert len(inner[1]._forward_pre_hooks) == 1  # type: ignore[index]
    opened = unlock(inner)
    assert len(opened[1]._forward_pre_hooks) == 0  # type: ignore[index]
    assert len(opened[1]._forward_hooks) == 1  # type: ignore[index]


def test_an_averaged_copy_keeps_the_own_pad() -> None:
    model = locked("batch")
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    assert set(shared_state(average)) == {"n_averaged"} | {
        f"module.{n}" for n in shared_state(model)
    }
    assert torch.equal(average.eval()(IMAGE), model.eval()(IMAGE))


@pytest.mark.parametrize("decay", [None, 0.9])
def test_an_average_within_one_pad_has_that_pad(decay: float | None) -> None:
    model = locked("batch")
    renew(model, KEY, 3)
    average = averaged(model, decay, use_buffers=False)
    for _ in range(3):
        shift_learned(model)
        average.update_parameters(model)
    assert epoch_of(average) == 3
    (pad,) = {tuple(s.like().flatten().tolist()) for s in sources_of(average).values()}
    assert pad == tuple(sources_of(model)["1"].like().flatten().tolist())
    average.eval()(IMAGE)


@pytest.mark.parametrize(
    "decay, buffers, says",
    [
        (0.9, True, r"of epoch 3, .* says 2.*use_buffers=False"),  # 2.7 + 0.3, as an integer
        (None, False, r"of epoch 3, .* says 5.*anew after"),
    ],
)
def test_an_average_whose_pad_is_not_the_one_it_says(
    decay: float | None, buffers: bool, says: str
) -> None:
    model = locked("batch")
    renew(model, KEY, 3)
    average = averaged(model, decay, use_buffers=buffers)
    average.eval()(IMAGE)
    if not buffers:
        renew(model, KEY, 5)
    for _ in range(2):
        average.update_parameters(model)
    with pytest.raises(LockError, match=says):
        average.eval()(IMAGE)
    with torch.inference_mode(), pytest.raises(LockError, match=says):
        average(IMAGE)


def averaged(model: nn.Module, decay: float | None, *, use_buffers: bool) -> AveragedModel:
    ema = None if decay is None else get_ema_multi_avg_fn(decay)
    average = AveragedModel(model, use_buffers=use_buffers, multi_avg_fn=ema)
    average.update_parameters(model)
    return average


def shift_learned(model: nn.Module) -> None:
    with torch.no_grad():
        for source in sources_of(model).values():
            for parameter in source.parameters():
                parameter.add_(0.01)


def test_a_pad_in_inference_mode_hears_of_its_epoch() -> None:
    outside = locked("batch").eval()
    with torch.inference_mode():
        model = copy.deepcopy(outside)
        model(IMAGE)
        sources_of(model)["1"].get_buffer("epoch").fill_(1)
        with pytest.raises(LockError, match="says 1"):
            model(IMAGE)
