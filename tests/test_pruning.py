"""Which entries stay: against a naive reference, of ties, and under vmap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from fedkl.errors import ConfigError
from fedkl.pruning import check_ratio, kept, kept_count
from fedkl.rng import derive


def naive(values: list[float], ratio: float) -> list[bool]:
    """The largest by magnitude, one after the other; of equal ones the first."""
    found = [False] * len(values)
    for _ in range(kept_count(len(values), ratio)):
        rest = [i for i, taken in enumerate(found) if not taken]
        found[max(rest, key=lambda i: (abs(values[i]), -i))] = True
    return found


numbers = st.lists(
    st.one_of(st.floats(-2, 2, width=32), st.sampled_from([0.0, 1.0, -1.0])), min_size=1, max_size=9
)


@given(numbers, st.floats(0, 1, exclude_max=True))
def test_the_largest_stay_and_of_equal_ones_the_first(values: list[float], ratio: float) -> None:
    change = torch.tensor(values, dtype=torch.float32)
    assert kept(change, ratio).tolist() == naive(values, ratio)


def test_against_a_partition_of_numpy() -> None:
    change = torch.randn(7, 5, 3, generator=derive(0, "change"))
    sizes = np.abs(change.numpy())
    bound = np.partition(sizes.flatten(), 94)[94]  # 105 entries, of which 94 are removed
    assert np.array_equal(kept(change, 0.9).numpy(), sizes >= bound)


@pytest.mark.parametrize(
    "entries, ratio, stay",
    [(10, 0.9, 1), (100, 0.29, 71), (10, 0.7, 3), (1000, 0.999, 1), (10, 0.999, 1), (1, 0.5, 1),
     (10, 0.0, 10), (3, 0.5, 2), (0, 0.5, 0)],
)  # fmt: skip
def test_no_more_is_removed_than_was_asked_for_and_one_stays(
    entries: int, ratio: float, stay: int
) -> None:
    assert kept_count(entries, ratio) == stay
    assert int(kept(torch.arange(float(entries)), ratio).sum()) == stay


def test_what_has_diverged_stays() -> None:
    """So that the server still sees it, and refuses it."""
    assert kept(torch.tensor([1.0, math.nan, 2.0]), 0.9).tolist() == [False, True, False]


def test_under_vmap_every_row_for_itself() -> None:
    rows = torch.randn(6, 4, 3, generator=derive(0, "change"))

    def one(row: Tensor) -> Tensor:
        return kept(row, 0.6)

    assert torch.equal(vmap(one)(rows), torch.stack([one(row) for row in rows]))


@pytest.mark.parametrize("ratio", [1.0, -0.1, math.nan, math.inf])
def test_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match=rf"prune_ratio must be in \[0, 1\), got {ratio:g}"):
        check_ratio(ratio)
