"""Plain mistakes get an error of the library that says what was got, what goes, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedkl.errors import CheckpointError, ConfigError, FedKLError, LockError
from fedkl.key import Key
from fedkl.locking import (
    Channel,
    LockSpec,
    Pad,
    check_optimizer,
    is_locked,
    lock,
    lock_like,
    lock_spec,
    lockable,
    merge,
    private_state,
    scheme_of,
    shared_state,
    unlock,
)

from .zoo import IMAGE, SMALL

KEY = Key.generate()


def plain() -> nn.Module:
    return SMALL["batch"][0]()


def meta() -> nn.Module:
    with torch.device("meta"):
        return plain()


def locked(**changes: Any) -> nn.Module:
    return lock(plain(), KEY, **{"example": IMAGE, **changes})


def hostile(shape: tuple[int, ...]) -> LockSpec:
    spec = lock_spec(locked(scheme="pad"))
    return replace(spec, sites=(replace(spec.sites[0], shape=shape),))


MISTAKES: dict[str, tuple[Callable[[], object], type[FedKLError], str]] = {
    "layers none": (lambda: locked(layers=None), LockError, "got NoneType"),
    "layers number": (lambda: locked(layers=3), LockError, "'first', 'all', a name.*got int"),
    "layers numbers": (lambda: locked(layers=[1]), LockError, r"text.*got 1 \(int\)"),
    "scheme none": (lambda: locked(scheme=None), ConfigError, "got NoneType; choose one of"),
    "scheme class": (lambda: locked(scheme=Pad), ConfigError, r"the class Pad.*Pad\(\)"),
    "scheme and settings": (
        lambda: locked(scheme=Channel(spread=0.5), spread=99.0, bogus=1),
        ConfigError,
        "settings already, got bogus, spread",
    ),
    "spread text": (lambda: locked(spread="1"), ConfigError, "spread.*a number or None, got '1'"),
    "length fraction": (lambda: locked(length=1.5), ConfigError, "length.*an integer, got 1.5"),
    "length huge": (lambda: locked(length=2**40), ConfigError, "at most 1048576, got"),
    "stem text": (lambda: locked(scheme="pad", stem="no"), ConfigError, "stem.*true or false, got"),
    "bias number": (lambda: Channel(bias=1), ConfigError, "true or false, got 1"),  # type: ignore[arg-type]
    "length true": (lambda: Channel(length=True), ConfigError, "an integer, got True"),
    "norm unread": (lambda: locked(norm="bach"), ConfigError, "unknown norm to insert 'bach'"),
    "norm none": (lambda: locked(norm=None), ConfigError, "unknown norm to insert 'None'"),
    "group text": (lambda: locked(group="x"), LockError, "group must be a fedkl.Key.*got str"),
    "meta": (lambda: lock(meta(), KEY), LockError, "meta device.*to_empty"),
    "example empty": (
        lambda: locked(example=IMAGE[:0]),
        LockError,
        r"example holds no inputs \(0, 3, 8, 8\)",
    ),
    "example NaN": (lambda: locked(example=IMAGE * torch.nan), LockError, "example holds NaN"),
    "merge none": (lambda: merge(None), LockError, "got NoneType"),  # type: ignore[arg-type]
    "unlock state": (lambda: unlock({}), LockError, "got dict; pass the model"),  # type: ignore[arg-type]
    "share none": (lambda: shared_state(None), LockError, "got NoneType"),  # type: ignore[arg-type]
    "lockable none": (lambda: lockable(None), LockError, "got NoneType"),  # type: ignore[arg-type]
    "no spec": (lambda: lock_like(plain(), KEY, "x"), LockError, "lock spec, got str"),  # type: ignore[arg-type]
    "no optimizer": (lambda: check_optimizer(locked(), None), LockError, "got NoneType"),  # type: ignore[arg-type]
    "spec none": (lambda: LockSpec.from_dict(None), CheckpointError, "got NoneType"),  # type: ignore[arg-type]
    "huge": (lambda: lock_like(plain(), KEY, hostile((10**9, 10**9))), LockError, "a size no lock"),
    "nothing": (lambda: lock_like(plain(), KEY, hostile((0, 4))), LockError, "a size no lock"),
    "setting scheme": (lambda: scheme_of("pad", **{"scheme": 1}), ConfigError, "unknown setting"),
    "lone layer": (
        lambda: lock(nn.Conv2d(3, 4, 3), KEY, scheme="pad", example=IMAGE),
        LockError,
        "nothing is left to share",
    ),
    "lone norm": (
        lambda: lock(nn.BatchNorm2d(3), KEY, example=IMAGE),
        LockError,
        "nothing is left to share",
    ),
}


@pytest.mark.parametrize("which", MISTAKES)
def test_mistake(which: str) -> None:
    act, error, message = MISTAKES[which]
    with pytest.raises(error, match=message):
        act()


@pytest.mark.parametrize("scheme", ["pad", "channel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_example_takes_the_dtype_of_the_model(dtype: torch.dtype, scheme: str) -> None:
    net = plain().to(dtype)
    with pytest.raises(LockError) as caught:
        lock(net, KEY, scheme=scheme, example=IMAGE)
    assert f"The example is torch.float32, the model's parameters {dtype}; " in str(caught.value)
    assert f"example.to({dtype}) or model.to(torch.float32)" in str(caught.value)
    assert "at least two inputs" not in str(caught.value)
    model = lock(net, KEY, scheme=scheme, example=IMAGE.to(dtype))
    model(IMAGE.to(dtype)).sum().backward()
    state = {**shared_state(model), **private_state(model)}
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {dtype}
    with pytest.raises(LockError, match="at least two inputs"):  # its size is at fault
        lock(net, KEY, scheme=scheme, example=IMAGE[:, :2].to(dtype))


@pytest.mark.parametrize("shape", [[0], ["4"], [4.0], [], 7, None])
def test_a_spec_with_a_shape_that_is_none_is_refused(shape: Any) -> None:
    data = lock_spec(locked()).to_dict()
    data["sites"][0]["shape"] = shape
    with pytest.raises(CheckpointError, match="not a lock spec"):
        LockSpec.from_dict(data)


def test_infinity_in_an_example_has_its_uses() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            weights = (x @ x.mT + mask).softmax(-1)
            out: Tensor = self.head(self.norm(self.inner(weights @ x)))
            return out

    mask = torch.full((4, 4), -torch.inf).triu(1)
    assert is_locked(lock(Masked(), KEY, example=(torch.rand(2, 4, 6), mask)))


def test_gradients_of_nan_do_not_verify_a_lock() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    with torch.no_grad():
        model[2].weight.fill_(torch.nan)
    with pytest.raises(LockError, match="do not change the output"):
        lock(model, KEY, example=torch.rand(4, 6))
