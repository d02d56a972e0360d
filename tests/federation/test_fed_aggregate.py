"""The aggregate against NumPy, and what the server refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fedhelp import assert_same, snapshot
from torch import Tensor

from fedkl.errors import FederationError, UpdateError
from fedkl.federation import Update, aggregate, check_update
from fedkl.federation.aggregate import Tally, accepted
from fedkl.rng import derive

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def updates(count: int, dtype: torch.dtype = torch.float32) -> list[Update]:
    made = []
    for client in range(count):
        g = derive(client, "update")
        tensors = {
            "a": torch.randn(3, 4, generator=g).to(dtype),
            "b": torch.randn((), generator=g).to(dtype),
            "steps": torch.tensor(10 - client),
        }
        made.append(Update(client, 1, "state", tensors, 10 + 7 * client))
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_it_is_the_mean_in_float64(count: int, weighted: bool, dtype: torch.dtype) -> None:
    given = updates(count, dtype)
    before = [snapshot(u.tensors) for u in given]
    got = aggregate(iter(given), weighted=weighted)
    weights = np.array([u.examples if weighted else 1 for u in given], dtype=np.float64)
    for name in ("a", "b"):
        stack = np.stack([u.tensors[name].double().numpy() for u in given])
        mean = np.tensordot(weights / weights.sum(), stack, axes=1)
        want = torch.from_numpy(np.asarray(mean)).to(dtype)
        tolerance = 1e-15 if dtype == torch.float64 else torch.finfo(dtype).eps
        assert got[name].dtype == dtype
        torch.testing.assert_close(got[name], want, rtol=tolerance, atol=0)
    assert got["steps"].equal(torch.tensor(10))
    assert got["steps"].dtype == torch.int64
    for update, kept in zip(given, before, strict=True):
        assert_same(update.tensors, kept)


def test_a_mean_of_one_is_that_one_and_a_copy() -> None:
    (only,) = updates(1, torch.float64)
    got = aggregate([only])
    assert_same(got, only.tensors)
    for tensor in got.values():
        tensor.add_(1)
    assert_same(only.tensors, updates(1, torch.float64)[0].tensors)


def test_of_integers_the_largest_wins_in_any_order() -> None:
    given = [Update(c, 1, "state", {"n": torch.tensor([c, -c])}, 1) for c in (1, 3, 2)]
    assert aggregate(given)["n"].tolist() == [3, -1]
    assert given[0].tensors["n"].tolist() == [1, -1]  # the update is the caller's


def test_weights_matter() -> None:
    one, two = torch.tensor([0.0]), torch.tensor([1.0])
    given = [Update(0, 1, "state", {"a": one}, 1), Update(1, 1, "state", {"a": two}, 3)]
    assert aggregate(given)["a"].item() == 0.75
    assert aggregate(given, weighted=False)["a"].item() == 0.5


def test_small_differences_survive_many_clients() -> None:
    value = torch.tensor([1.0 + 2**-23])
    many = (Update(c, 1, "state", {"a": value.clone()}, 3) for c in range(1000))
    assert aggregate(many)["a"].equal(value)


def test_nothing_to_aggregate() -> None:
    with pytest.raises(FederationError, match="no update to aggregate"):
        aggregate([])


def changed(**tensors: Tensor) -> Update:
    base = dict(updates(1)[0].tensors)
    return Update(4, 9, "state", {**base, **tensors}, 5)


def without(name: str) -> Update:
    tensors = {n: t for n, t in updates(1)[0].tensors.items() if n != name}
    return Update(4, 9, "state", tensors, 5)


REFUSED = {
    "nan": (changed(a=torch.full((3, 4), float("nan"))), r"a holds NaN"),
    "one nan": (changed(b=torch.tensor(float("nan"))), r"b holds NaN"),
    "infinity": (changed(a=torch.full((3, 4), float("inf"))), r"a holds NaN or infinity"),
    "minus infinity": (changed(b=torch.tensor(-float("inf"))), r"b holds"),
    "missing": (without("b"), "missing b"),
    "extra": (changed(c=torch.zeros(1)), "unexpected c"),
    "shape": (changed(a=torch.zeros(4, 3)), r"a has shape \(4, 3\), expected \(3, 4\)"),
    "dtype": (changed(a=torch.zeros(3, 4).half()), "a is torch.float16, expected torch.float32"),
    "integer": (changed(steps=torch.tensor(1.0)), "steps is torch.float32, expected torch.int64"),
    "examples": (Update(4, 9, "state", updates(1)[0].tensors, 0), "claims 0 examples"),
    "negative": (Update(4, 9, "state", updates(1)[0].tensors, -3), "claims -3 examples"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    bad, message = REFUSED[case]
    expected = updates(1)[0].tensors
    with pytest.raises(UpdateError, match=message) as caught:
        check_update(bad, expected)
    assert "client 4 in round 9" in str(caught.value)
    good = updates(3)
    tally = Tally()
    passed = list(accepted([good[0], bad, good[1]], expected, tally))
    assert passed == [good[0], good[1]]
    assert tally.accepted == [0, 1]
    assert list(tally.refused) == [4]


def test_a_good_update_passes() -> None:
    check_update(updates(1)[0], updates(1)[0].tensors)


def test_complex_tensors_are_averaged_and_looked_at_for_nan() -> None:
    values = [torch.tensor([1 + 2j]), torch.tensor([4 - 4j])]
    found = aggregate(Update(i, 1, "state", {"w": v}, 1 + i) for i, v in enumerate(values))
    assert found["w"].dtype == torch.complex64
    assert torch.allclose(found["w"], torch.tensor([3 - 2j]))
    odd = Update(0, 1, "state", {"w": torch.tensor([complex(0, float("nan"))])}, 1)
    with pytest.raises(UpdateError, match="NaN"):
        check_update(odd, {"w": values[0]})
