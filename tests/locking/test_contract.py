"""What every scheme promises on every kind of network: one table times one fixture."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedkl.errors import LockError, SecretError
from fedkl.key import Key
from fedkl.locking import (
    LockSpec,
    is_locked,
    load_private_state,
    load_shared_state,
    lock,
    lock_like,
    lock_spec,
    merge,
    private_state,
    shared_state,
    sources_of,
    unlock,
)
from fedkl.locking.survey import call

from .zoo import POSITIONAL, SCHEMES, SETTINGS, SMALL, RootNorm, TwoParents

# The second of two inputs goes around the lock on the first.
pytestmark = pytest.mark.filterwarnings("ignore::fedkl.errors.ShortcutWarning")

KEY = Key.generate()
CASES = [(name, layers) for name in SMALL for layers in ("first", "all")]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, str]:
    name, layers = request.param
    factory, example = SMALL[name]
    return factory(), example, layers


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def skip_what_a_pad_refuses(model: nn.Module, scheme: str) -> None:
    if scheme in POSITIONAL and isinstance(model, TwoParents):
        pytest.skip("runs one norm at two sizes, which test_pad.py tests")
    if scheme in POSITIONAL and isinstance(model, RootNorm | nn.Conv2d):
        pytest.skip("nothing would be left to share, which test_mistakes.py tests")


def made(case: tuple[nn.Module, Any, str], scheme: str) -> tuple[nn.Module, nn.Module, Any]:
    model, example, layers = case
    skip_what_a_pad_refuses(model, scheme)
    settings = SETTINGS[scheme]
    locked = lock(model, KEY, scheme=scheme, layers=layers, example=example, **settings)
    return model, locked, example


def outputs(model: nn.Module, example: Any, *, train: bool) -> list[Tensor]:
    """On a copy, so that running statistics stay where they are."""
    with torch.no_grad():
        return tree_leaves(call(copy.deepcopy(model).train(train), example))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def frozen(model: nn.Module) -> dict[str, Any]:
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [(n, type(m), m.training, m.__dict__.keys()) for n, m in model.named_modules()]
    return {"state": state, "modes": modes, "parameters": [id(p) for p in model.parameters()]}


def unchanged(before: dict[str, Any], model: nn.Module) -> bool:
    after = frozen(model)
    a, b = before.pop("state"), after.pop("state")
    return before == after and list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def test_argument_stays_untouched(case: Any, scheme: str) -> None:
    before = frozen(case[0])
    model, locked, _ = made(case, scheme)
    assert unchanged(before, model)
    assert is_locked(locked)
    assert not is_locked(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in locked.parameters()}


def test_split_is_complete_and_disjoint(case: Any, scheme: str) -> None:
    model, locked, _ = made(case, scheme)
    shared, private = shared_state(locked), private_state(locked)
    assert not set(shared) & set(private)
    assert set(shared) | set(private) == set(locked.state_dict())
    assert {n for n in shared if "inserted_norm" not in n} <= set(model.state_dict())
    assert bool(private) is (scheme != "norm")
    assert not any("keylock" in n for n in shared)
    for site in sources_of(locked):
        own = {n.rpartition(".")[2] for n in shared if n.rpartition(".")[0] == site}
        assert not own & {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def test_unlock_is_bit_identical(case: Any, scheme: str) -> None:
    model, locked, example = made(case, scheme)
    before = frozen(model)
    opened = unlock(locked)
    assert is_locked(locked)
    assert not is_locked(opened)
    a, b = before["state"], opened.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert [type(m) for m in model.modules()] == [type(m) for m in opened.modules()]
    for train in (True, False):
        assert same(outputs(model, example, train=train), outputs(opened, example, train=train))


def test_lock_changes_the_output(case: Any) -> None:
    model, locked, example = made(case, "channel")
    if isinstance(getattr(model, "head", None), nn.Linear) and not model.head.weight.any():
        for m in (model, locked):
            nn.init.ones_(m.head.weight)  # type: ignore[arg-type, union-attr]
            m.head.weight.data[:, ::2] = -2.0  # type: ignore[union-attr, index]
    for train in (True, False):
        assert not same(outputs(model, example, train=train), outputs(locked, example, train=train))


def test_merge_computes_the_same_without_a_lock(case: Any, scheme: str) -> None:
    _, locked, example = made(case, scheme)
    if scheme in POSITIONAL:
        with pytest.raises(LockError, match="one scale per position"):
            merge(locked)
        return
    merged = merge(locked)
    assert not is_locked(merged)
    assert not any("keylock" in n for n in merged.state_dict())
    for train in (True, False):
        pairs = zip(
            outputs(locked, example, train=train),
            outputs(merged, example, train=train),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert pickle.loads(pickle.dumps(merged)).state_dict().keys() == merged.state_dict().keys()


def test_states_and_spec_make_the_same_model_again(case: Any, scheme: str) -> None:
    model, locked, example = made(case, scheme)
    tree_leaves(call(locked.train(), example))  # moves the running statistics
    spec = LockSpec.from_dict(json.loads(json.dumps(lock_spec(locked).to_dict())))
    assert spec == lock_spec(locked)
    for p in model.parameters():
        nn.init.normal_(p)
    fresh = lock_like(model, KEY, spec)
    load_shared_state(fresh, shared_state(locked))
    load_private_state(fresh, private_state(locked))
    for train in (True, False):
        assert same(outputs(locked, example, train=train), outputs(fresh, example, train=train))


def test_inplace_returns_the_argument_and_unlocks_to_it(case: Any, scheme: str) -> None:
    model, example, layers = case
    skip_what_a_pad_refuses(model, scheme)
    before, settings = frozen(model), SETTINGS[scheme]
    locked = lock(
        model, KEY, scheme=scheme, layers=layers, example=example, inplace=True, **settings
    )
    assert locked is model
    unlock(model, inplace=True)
    assert unchanged(before, model)


def test_deep_copies_compute_with_the_same_key(case: Any, scheme: str) -> None:
    _, locked, example = made(case, scheme)
    once = copy.deepcopy(locked)
    twice = copy.deepcopy(once)
    assert not {id(p) for p in twice.parameters()} & {id(p) for p in locked.parameters()}
    # Not through outputs(), which compares copies with copies.
    with torch.no_grad():
        results = [tree_leaves(call(m.eval(), example)) for m in (locked, once, twice)]
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("keyed", ["channel", "paper"])
def test_key_is_nowhere_to_be_seen(case: Any, keyed: str) -> None:
    _, locked, _ = made(case, keyed)
    law = lock_spec(locked).settings["law"]
    vector = KEY.vector(32, law)
    tensors = [*locked.state_dict().values(), *locked.parameters(), *locked.buffers()]
    for row in (row for t in tensors if t.numel() >= 32 for row in t.detach().reshape(-1).unfold(
        0, 32, 1
    )[:2000]):  # fmt: skip
        cosine = torch.nn.functional.cosine_similarity(
            row.float() - row.float().mean(), vector - vector.mean(), dim=0
        )
        assert abs(float(cosine)) < 0.99
    assert not any(t.shape == (32,) and torch.equal(t, vector) for t in tensors)
    texts = [repr(locked), *(repr(m.__dict__) for m in locked.modules())]
    numbers = [f"{float(v):.4f}" for v in vector * 32**-0.5]
    assert not any(", ".join(numbers[:3]) in text for text in texts)
    assert any("Sealed(<secret>)" in text for text in texts)


@pytest.mark.parametrize("keyed", ["channel", "paper", "pad"])
def test_pickling_raises(case: Any, keyed: str) -> None:
    _, locked, _ = made(case, keyed)
    for write in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
        with pytest.raises(SecretError, match=r"state_dict.*key\.save"):
            write(locked)
    for source in sources_of(locked).values():
        # A chained lock holds no key of its own, but leads to one that does.
        for part in [source, *([] if source._sealed is None else [source._sealed])]:
            with pytest.raises(SecretError):
                pickle.dumps(part)


def test_locking_twice_is_an_error(case: Any, scheme: str) -> None:
    model, locked, example = made(case, scheme)
    with pytest.raises(LockError, match="unlock"):
        lock(locked, KEY, scheme=scheme, example=example)
    with pytest.raises(LockError, match="unlock"):
        lock_like(locked, KEY, lock_spec(locked))
    with pytest.raises(LockError, match="not locked"):
        unlock(model)
