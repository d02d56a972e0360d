"""The client update: pure, and the same as a plain PyTorch loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fedhelp import DEFENSES, assert_same, differ, digits, snapshot, task, workspace
from torch import nn
from torch.nn.functional import cross_entropy

from fedkl.defenses import DefenseConfig, make_defense
from fedkl.errors import DataError, StateError
from fedkl.federation import ClientResult, ClientTask, TrainingConfig, Workspace, client_update
from fedkl.key import Key
from fedkl.locking import load_private_state, load_shared_state, private_views, shared_views
from fedkl.models import build
from fedkl.rng import borrowed, derive

SMALL = TrainingConfig(batch_size=32)
LENET = {"model": "lenet"}


def result(space: Workspace, shared: Any, given: ClientTask, seed: int = 0) -> ClientResult:
    return client_update(space, shared, given, derive(seed, "client", given.client, given.round))


def key_for(defense: str) -> Key | None:
    return Key.generate() if defense in ("channel", "pad") else None


def assert_equal_results(a: ClientResult, b: ClientResult) -> None:
    assert_same(a.update.tensors, b.update.tensors)
    assert_same(a.private, b.private)
    assert_same(a.moments, b.moments)
    assert a.loss == b.loss
    assert a.update.examples == b.update.examples


def naive(defense: str, model: str, shared: Any, given: ClientTask, cfg: TrainingConfig) -> Any:
    """What a reader of the paper would write: load, loop, state dict."""
    value = make_defense(DefenseConfig(name=defense))
    plain = build(model, num_classes=10, channels=1, image_size=16, generator=derive(0, "other"))
    net = value.prepare(plain, given.key, digits().public.batch(torch.arange(4))[0])
    load_shared_state(net, shared)
    if given.private:
        load_private_state(net, given.private)
    net.train()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=given.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    generator = derive(0, "client", given.client, given.round)
    with borrowed(generator):
        for _ in range(cfg.local_epochs):
            order = given.index[torch.randperm(len(given.index), generator=generator)]
            for rows in order.split(cfg.batch_size):
                optimizer.zero_grad()
                x, y = digits().train.batch(rows)
                cross_entropy(net(x), y).backward()
                optimizer.step()
    return snapshot(shared_views(net)), snapshot(private_views(net))


@pytest.mark.parametrize("model", ["lenet", "fedhelp:normed"])
@pytest.mark.parametrize("defense", DEFENSES)
def test_it_is_a_plain_training_loop(defense: str, model: str) -> None:
    settings = TrainingConfig(batch_size=32, local_epochs=2)
    space = workspace(defense, settings, model=model)
    first = task(key=key_for(defense))
    shared = snapshot(space.shared)
    got = result(space, shared, first)
    want_shared, want_private = naive(defense, model, shared, first, settings)
    assert_same(got.update.tensors, want_shared)
    assert_same(got.private, want_private)
    assert differ(got.update.tensors, shared)
    second = task(key=first.key, private=got.private, round_=2)
    again = result(space, got.update.tensors, second)
    want_shared, want_private = naive(defense, model, got.update.tensors, second, settings)
    assert_same(again.update.tensors, want_shared)
    assert_same(again.private, want_private)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["fedavg", "fedsgd"])
@pytest.mark.parametrize("defense", DEFENSES)
def test_who_played_before_does_not_matter(defense: str, method: str, bias: bool) -> None:
    settings = TrainingConfig(batch_size=32, keep_momentum=True)
    lock = {"bias": True} if bias and defense == "channel" else {}
    space = workspace(defense, settings, method=method, join_steps=2, augmented=True, lock=lock)
    shared = snapshot(space.shared)
    a, b = task(0, key=key_for(defense)), task(1, key=key_for(defense), join=True)
    alone = result(space, shared, b)
    played = result(space, shared, a)
    for _ in range(2):
        played = result(space, shared, task(0, key=a.key, private=played.private, round_=2))
    assert_equal_results(result(space, shared, b), alone)
    fresh = workspace(defense, settings, method=method, join_steps=2, augmented=True, lock=lock)
    assert_equal_results(result(fresh, shared, b), alone)


@pytest.mark.parametrize("defense", DEFENSES)
def test_arguments_stay_as_they_were_and_results_do_not_alias(defense: str) -> None:
    space = workspace(defense, TrainingConfig(batch_size=32, keep_momentum=True))
    shared = snapshot(space.shared)
    first = result(space, shared, task(key=key_for(defense)))
    given = task(key=key_for(defense), private=first.private, moments=first.moments, round_=2)
    parts = (shared, first.private, first.moments, first.update.tensors)
    before = [snapshot(part) for part in parts]
    result(space, shared, given)
    for part, kept in zip(parts, before, strict=True):
        assert_same(part, kept)


def test_global_randomness_is_left_alone_and_does_not_matter() -> None:
    space = workspace("none", SMALL)  # it has dropout
    shared = snapshot(space.shared)
    state = torch.get_rng_state()
    first = result(space, shared, task())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert_equal_results(result(space, shared, task()), first)
    assert differ(result(space, shared, task(), seed=1).update.tensors, first.update.tensors)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", "adadelta"])
@pytest.mark.parametrize("defense", ["none", "channel", "pad"])
def test_momentum_is_kept_or_not(defense: str, optimizer: str) -> None:
    """Two rounds with kept moments are one run of two epochs; without, they are not."""
    # One image over and over: the order of the batch, which differs, makes no difference.
    key, index = key_for(defense), torch.full((64,), 7)
    lock = {} if defense == "none" else {"norm": "group"}

    def rounds(keep: bool) -> ClientResult:
        settings = TrainingConfig(batch_size=64, optimizer=optimizer, lr=0.01, keep_momentum=keep)
        space = workspace(defense, settings, model="fedhelp:mlp", lock=lock)
        shared = snapshot(space.shared)
        one = result(space, shared, task(key=key, index=index))
        assert bool(one.moments) == keep
        two = task(key=key, index=index, private=one.private, moments=one.moments, round_=2)
        return result(space, one.update.tensors, two)

    settings = TrainingConfig(batch_size=64, optimizer=optimizer, lr=0.01, local_epochs=2)
    space = workspace(defense, settings, model="fedhelp:mlp", lock=lock)
    whole = result(space, snapshot(space.shared), task(key=key, index=index))
    assert_same(rounds(keep=True).update.tensors, whole.update.tensors)
    assert_same(rounds(keep=True).private, whole.private)
    assert differ(rounds(keep=False).update.tensors, rounds(keep=True).update.tensors)


@pytest.mark.parametrize("defense", ["fedbn", "channel", "pad"])
def test_joining_moves_the_lock_alone(defense: str) -> None:
    # The second norm is not locked: its shared statistics see the images as well.
    space = workspace(defense, SMALL, join_steps=3, lock={"layers": "first"})
    assert any("running_mean" in name for name in space.shared)
    shared, key = snapshot(space.shared), key_for(defense)
    space.enter(shared, key, None)
    start = snapshot(space.private)
    space.join(shared, torch.arange(60), derive(0, "join"), 0.05)
    assert_same(space.shared, shared)
    learned = [n for n, p in space.model.named_parameters() if n in space.private]
    assert learned
    assert all(not torch.equal(space.private[n], start[n]) for n in learned)
    assert all(p.grad is None for p in space.model.parameters())


def test_joining_changes_what_a_late_client_sends() -> None:
    space = workspace("channel", SMALL, join_steps=3)
    shared, key = snapshot(space.shared), Key.generate()
    plain = result(space, shared, task(key=key, round_=5))
    joined = result(space, shared, task(key=key, round_=5, join=True))
    assert differ(plain.update.tensors, joined.update.tensors)


def test_a_late_client_starts_from_its_key() -> None:
    space = workspace("channel", SMALL)
    shared, key = snapshot(space.shared), Key.generate()
    result(space, shared, task(0, key=Key.generate()))
    space.enter(shared, key, None)
    value = make_defense(DefenseConfig(name="channel"))
    plain = build(
        "fedhelp:normed", num_classes=10, channels=1, image_size=16, generator=derive(0, "x")
    )
    fresh = value.prepare(plain, key, digits().public.batch(torch.arange(4))[0])
    assert_same(space.private, private_views(fresh))


def test_local_steps_replace_epochs() -> None:
    index, generator = torch.arange(70), derive(0, "batches")
    steps = workspace("none", TrainingConfig(batch_size=32, local_steps=5))
    sizes = [len(rows) for rows in steps.batches(index, generator)]
    assert sizes == [32, 32, 6, 32, 32]
    epochs = workspace("none", TrainingConfig(batch_size=32, local_epochs=2))
    rows = list(epochs.batches(index, generator))
    assert [len(r) for r in rows] == [32, 32, 6, 32, 32, 6]
    assert torch.equal(torch.cat(rows[:3]).sort().values, index)
    assert not torch.equal(torch.cat(rows[:3]), torch.cat(rows[3:]))


@pytest.mark.parametrize(
    "model, rows, size, expected",
    [
        ("fedhelp:normed", 33, 32, [32]),  # a batch norm cannot take the last one
        ("fedhelp:mlp", 33, 32, [32, 1]),
        ("fedhelp:normed", 3, 1, [1, 1, 1]),  # as asked for, not an endless loop
        ("fedhelp:normed", 1, 32, [1]),
    ],
)
def test_a_last_batch_of_one(model: str, rows: int, size: int, expected: list[int]) -> None:
    space = workspace("none", TrainingConfig(batch_size=size), model=model)
    got = space.batches(torch.arange(rows), derive(0, "batches"))
    assert [len(r) for r in got] == expected
    endless = space.batches(torch.arange(rows), derive(0, "batches"), steps=2)
    assert len(list(endless)) == 2


def test_one_example_behind_a_batch_norm_is_the_users_to_mend() -> None:
    space = workspace("none", SMALL)
    with pytest.raises(DataError, match="batch of one example"):
        result(space, snapshot(space.shared), task(rows=1))
    space = workspace("none", SMALL, model="fedhelp:mlp")
    result(space, snapshot(space.shared), task(rows=1))


def test_states_that_do_not_fit_are_refused() -> None:
    space = workspace("channel", SMALL)
    shared, key = snapshot(space.shared), Key.generate()
    name = next(iter(shared))
    with pytest.raises(StateError, match="shared state does not fit"):
        result(space, {n: t for n, t in shared.items() if n != name}, task(key=key))
    with pytest.raises(StateError, match="private state does not fit"):
        result(space, shared, task(key=key, private={}))


def test_nothing_private_is_in_an_update() -> None:
    for defense in ("fedbn", "channel"):
        for method in ("fedavg", "fedsgd"):
            space = workspace(defense, SMALL, method=method)
            got = result(space, snapshot(space.shared), task(key=key_for(defense)))
            assert not set(got.update.tensors) & set(got.private)
            assert set(got.update.tensors) | set(got.private) == set(space.model.state_dict())
            assert "keylock" not in " ".join(got.update.tensors)


def test_representations_show_no_tensor() -> None:
    space = workspace("channel", SMALL)
    given = task(key=Key.generate())
    got = result(space, snapshot(space.shared), given)
    assert repr(given) == "ClientTask(client=0, round=1, examples=100)"
    assert "tensor" not in repr(got)


def test_fedsgd_sends_the_gradient_of_one_batch() -> None:
    space = workspace("none", TrainingConfig(batch_size=200), model="fedhelp:tied", method="fedsgd")
    shared, given = snapshot(space.shared), task()
    got = result(space, shared, given)
    net: nn.Module = space.model
    net.zero_grad()
    x, y = digits().train.batch(given.index)
    cross_entropy(net(x), y).backward()
    assert got.update.kind == "gradient"
    assert got.update.examples == 100
    for name, parameter in net.named_parameters(remove_duplicate=False):
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got.update.tensors[name], want, rtol=1e-4, atol=1e-6)
    assert not got.update.tensors["frozen.weight"].any()
    assert got.update.tensors["again.weight"].any()
    assert_same(snapshot(space.shared), shared)
