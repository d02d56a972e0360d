"""A locked model under torch.compile, torch.func, DistributedDataParallel and averaging."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel

from fedkl.key import Key
from fedkl.locking import (
    is_locked,
    load_shared_state,
    lock,
    lock_spec,
    private_state,
    set_key,
    shared_state,
    unlock,
)

from .zoo import IMAGE, SMALL

KEY = Key.generate()


def locked(kind: str, **settings: object) -> nn.Module:
    factory, example = SMALL[kind]
    return lock(factory(), KEY, example=example, length=16, **settings)  # type: ignore[arg-type]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("scheme", ["channel", "paper"])
@pytest.mark.parametrize("kind", ["batch", "group", "no norm", "rms"])
def test_compile_gives_the_same_outputs_and_gradients(kind: str, scheme: str, backend: str) -> None:
    plain = locked(kind, scheme=scheme)
    inner = copy.deepcopy(plain)
    compiled = torch.compile(inner, backend=backend, fullgraph=True)
    for mode in (True, False):
        plain.train(mode)
        inner.train(mode)
        a, b = plain(IMAGE), compiled(IMAGE)
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        (a**2).sum().backward()
        (b**2).sum().backward()
    gradients = {n: p.grad for n, p in inner.named_parameters()}
    for name, p in plain.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-5)
    assert list(shared_state(compiled)) == list(shared_state(plain))
    assert not is_locked(unlock(compiled))
    set_key(compiled, Key.generate())
    assert not torch.equal(compiled(IMAGE), plain(IMAGE))


def test_functional_call_takes_other_lock_parameters() -> None:
    model, other = locked("group"), locked("group")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p))
    parameters = dict(other.named_parameters())
    assert torch.equal(functional_call(model, parameters, IMAGE), other(IMAGE))
    part = {n: p for n, p in parameters.items() if "keylock" in n}
    assert part
    mixed = functional_call(model, part, IMAGE)
    assert not torch.equal(mixed, other(IMAGE))
    assert not torch.equal(mixed, model(IMAGE))


@pytest.mark.parametrize("scheme", ["channel", "paper"])
@pytest.mark.parametrize("kind", ["group", "rms", "batch without statistics"])
def test_vmap_over_lock_parameters(kind: str, scheme: str) -> None:
    models = [locked(kind, scheme=scheme) for _ in range(3)]
    with torch.no_grad():
        for p in (p for m in models for p in m.parameters()):
            p.add_(0.1 * torch.randn_like(p))
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]

    def loss(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(models[0], (p, b), x)
        return (out**2).sum()

    got = vmap(grad(loss), (0, 0, None))(parameters, buffers, IMAGE)
    for index, model in enumerate(models):
        (model(IMAGE) ** 2).sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(got[name][index], p.grad, rtol=1e-3, atol=1e-3)


def test_vmap_over_examples_gives_gradients_per_example() -> None:
    model = locked("group")
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, p, x.unsqueeze(0))
        return (out**2).sum()

    got = vmap(grad(loss), (None, 0))(parameters, IMAGE)
    for index in range(len(IMAGE)):
        model.zero_grad()
        (model(IMAGE[index : index + 1]) ** 2).sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(got[name][index], p.grad, rtol=1e-3, atol=1e-3)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_leaves_no_prefix() -> None:
    model = locked("batch")
    plain = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model)
    (wrapped(IMAGE) ** 2).sum().backward()
    (plain(IMAGE) ** 2).sum().backward()
    for (_, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert list(shared_state(wrapped)) == list(shared_state(plain))
    assert list(private_state(wrapped)) == list(private_state(plain))
    assert lock_spec(wrapped) == lock_spec(plain)
    state = {n: t + 1 for n, t in shared_state(plain).items()}
    load_shared_state(wrapped, state)
    assert all(torch.equal(t, state[n]) for n, t in shared_state(model).items())
    unwrapped = unlock(wrapped)
    assert list(unwrapped.state_dict()) == list(SMALL["batch"][0]().state_dict())
    again = lock(DistributedDataParallel(unwrapped), KEY, example=IMAGE)
    assert not isinstance(again, DistributedDataParallel)


def test_an_averaged_copy_computes() -> None:
    model = locked("no norm")
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged.eval()(IMAGE), model.eval()(IMAGE))


def test_hooks_and_identity_of_modules_survive() -> None:
    model = SMALL["batch"][0]()
    norm, seen = model.get_submodule("1"), []
    norm.register_forward_hook(lambda *_: seen.append(1))
    locked_model = lock(model, KEY, example=IMAGE, inplace=True)
    assert locked_model.get_submodule("1") is norm
    assert isinstance(norm, nn.BatchNorm2d)
    seen.clear()
    locked_model(IMAGE)
    assert seen == [1]
