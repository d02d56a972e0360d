"""The split of the tensors and its strict loaders; the lock spec; the optimizer check."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedkl.errors import CheckpointError, ConfigError, LockError, StateError
from fedkl.key import Key
from fedkl.locking import (
    LockSpec,
    check_optimizer,
    load_private_state,
    load_shared_state,
    lock,
    lock_like,
    lock_spec,
    private_names,
    private_state,
    shared_state,
    state_problems,
)

from .zoo import SMALL

KEY = Key.generate()
State = dict[str, Tensor]


def locked(kind: str = "batch", **settings: Any) -> nn.Module:
    factory, example = SMALL[kind]
    settings = {"length": 8} | settings if settings.get("scheme") != "norm" else settings
    return lock(factory(), KEY, example=example, **settings)


def without(state: State) -> State:
    return dict(list(state.items())[1:])


def extra(state: State) -> State:
    return {**state, "surprise": torch.zeros(1)}


def reshaped(state: State) -> State:
    name = list(state)[-1]
    return {**state, name: state[name].unsqueeze(0)}


def retyped(state: State) -> State:
    name = list(state)[-1]
    return {**state, name: state[name].to(torch.float64)}


def no_tensor(state: State) -> State:
    return {**state, list(state)[-1]: [1.0]}  # type: ignore[dict-item]


@pytest.mark.parametrize("load, part", [(load_shared_state, shared_state),
                                        (load_private_state, private_state)])  # fmt: skip
@pytest.mark.parametrize(
    "spoil, message",
    [
        (without, "missing "),
        (extra, "unexpected surprise"),
        (reshaped, r"has shape \(1, .*expected"),
        (retyped, r"is torch\.float64, expected torch\."),
        (no_tensor, "is a list, expected a tensor"),
    ],
)
def test_loading_is_strict_and_copies_nothing_on_error(
    load: Callable[..., None],
    part: Callable[..., State],
    spoil: Callable[[State], State],
    message: str,
) -> None:
    model = locked(scheme="paper")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = {n: t + 1 for n, t in part(model).items()}
    with pytest.raises(StateError, match=message):
        load(model, spoil(state))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    load(model, state)
    after = model.state_dict()
    assert all(torch.equal(after[n], state[n]) for n in state)
    assert all(torch.equal(after[n], before[n]) for n in set(before) - set(state))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("read", "load"), [(shared_state, load_shared_state), (private_state, load_private_state)]
)
def test_a_state_without_numbers_is_refused(
    read: Callable[..., State], load: Callable[..., None], value: float
) -> None:
    model = locked()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = {n: t + 1 for n, t in read(model).items()}
    name = next(n for n in reversed(state) if state[n].is_floating_point())
    state[name].view(-1)[0] = value
    with pytest.raises(StateError, match=f"NaN or infinity in {name}"):
        load(model, state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("call", [private_state, lambda model: load_private_state(model, {})])
def test_nothing_of_an_unlocked_model_is_private(call: Callable[..., Any]) -> None:
    with pytest.raises(LockError, match=r"not locked, so nothing of it is private.*lock\("):
        call(SMALL["batch"][0]())


@pytest.mark.parametrize("state", [None, [1], "state"])
@pytest.mark.parametrize("load", [load_shared_state, load_private_state])
def test_what_is_no_state_is_refused(load: Callable[..., None], state: Any) -> None:
    with pytest.raises(StateError, match=r"a dict of tensors by name.*got"):
        load(locked(), state)


def test_averaged_integers_are_told_from_another_architecture() -> None:
    model = lock(nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(9))), KEY, layers="0")
    state = shared_state(model)
    mean = {n: torch.stack([t, t]).float().mean(0) for n, t in state.items()}
    with pytest.raises(StateError, match=r"num_batches_tracked is .*take them from one") as caught:
        load_shared_state(model, mean)
    assert str(caught.value).count("expected torch.int64") == 5
    assert "; and 3 more tensors. " in str(caught.value)
    double = {n: t.double() if t.is_floating_point() else t for n, t in state.items()}
    with pytest.raises(StateError, match=r"27 more tensors\. Convert it to the model's dtypes"):
        load_shared_state(model, double)


def test_all_problems_are_reported_at_once() -> None:
    state = shared_state(locked())
    problems = state_problems(state, extra(reshaped(without(state))))
    assert len(problems) == 3
    assert state_problems(state, state) == []


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind, site", [("batch", "1"), ("no norm", "0.inserted_norm")])
def test_statistics_are_private_unless_shared(kind: str, site: str, share: bool) -> None:
    model = locked(kind, share_statistics=share)
    statistics = {f"{site}.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert statistics <= set(shared_state(model) if share else private_state(model))
    assert bool(statistics & private_names(model)) is not share
    assert lock_spec(model).statistics_shared is share
    again = lock_like(SMALL[kind][0](), KEY, lock_spec(model))
    assert private_names(again) == private_names(model)


def test_names_are_the_original_ones() -> None:
    model = SMALL["batch"][0]()
    lost = set(model.state_dict()) - set(shared_state(locked()))
    inserted = set(shared_state(locked("no norm", scheme="norm"))) - set(
        SMALL["no norm"][0]().state_dict()
    )
    assert lost == {f"1.{n}" for n in ("weight", "bias", "running_mean", "running_var",
                                       "num_batches_tracked")}  # fmt: skip
    assert {n.split(".")[1] for n in inserted} == {"inserted_norm"}
    assert "0.inserted_norm.weight" in inserted


def test_both_names_of_one_norm_are_private() -> None:
    names = private_names(locked("two parents"))
    assert {"a.1.keylock.scale_weight", "b.1.keylock.scale_weight"} <= names
    assert not any("1." in n for n in shared_state(locked("two parents")))


def test_optimizer_built_before_the_lock_is_found_out() -> None:
    factory, example = SMALL["late"]
    model = factory()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    late = lock(model, KEY, example=example)
    with pytest.raises(LockError, match=r"does not hold 4 lock parameter.*norm1\.keylock"):
        check_optimizer(late, early)
    check_optimizer(late, torch.optim.SGD(late.parameters(), lr=0.1))
    partly = [p for n, p in late.named_parameters() if n != "norm2.keylock.shift_weight"]
    with pytest.raises(LockError, match=r"1 lock parameter\(s\): norm2\.keylock\.shift_weight"):
        check_optimizer(late, torch.optim.SGD(partly, lr=0.1))


def test_lock_like_wants_the_same_architecture_and_leaves_no_half_lock() -> None:
    factory, _ = SMALL["batch"]
    spec = lock_spec(locked())
    other = factory()
    other[1] = nn.BatchNorm2d(9)  # type: ignore[operator]
    before = [type(m) for m in other.modules()]
    with pytest.raises(LockError, match="kind or size of 1"):
        lock_like(other, KEY, spec, inplace=True)
    assert [type(m) for m in other.modules()] == before
    with pytest.raises(LockError, match="names 1, which this model lacks"):
        lock_like(nn.Conv2d(3, 8, 3), KEY, spec)
    with pytest.raises(LockError, match=r"does not fit.*no scale and shift"):
        lock_like(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), KEY, spec)
    with pytest.raises(LockError, match=r"needs a fedkl\.Key"):
        lock_like(factory(), None, spec)
    with pytest.raises(ConfigError, match="unknown scheme 'chanel'"):
        lock_like(factory(), KEY, replace(spec, scheme="chanel"))


@pytest.mark.parametrize("field", ["scheme", "settings", "sites", "norm", "statistics_shared"])
def test_a_spec_without_a_field_is_refused(field: str) -> None:
    data = json.loads(json.dumps(lock_spec(locked()).to_dict()))
    del data[field]
    with pytest.raises(CheckpointError, match=field):
        LockSpec.from_dict(data)


def test_the_spec_holds_no_secret() -> None:
    model = locked("late", scheme="paper")
    text = json.dumps(lock_spec(model).to_dict())
    assert KEY.fingerprint not in text
    assert len(text) < 1000
    assert not any(isinstance(v, Tensor) for v in lock_spec(model).settings.values())
