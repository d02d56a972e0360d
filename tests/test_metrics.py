"""Accuracy against counting by hand, intervals against tables and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkl.errors import DataError
from fedkl.metrics import accuracy, count_correct, mean_interval, paired_interval

FINITE = st.floats(-100, 100)


def test_counts_the_rows_whose_largest_logit_is_the_label() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
    labels = torch.tensor([0, 1, 1])
    assert count_correct(logits, labels) == 2
    assert accuracy(logits, labels) == pytest.approx(2 / 3)


def test_a_row_with_nan_is_never_right() -> None:
    """``argmax`` takes NaN for the largest: a model that diverged would know class 0."""
    nan = math.nan
    logits = torch.tensor([[nan, nan], [nan, 1.0], [1.0, nan], [1.0, nan], [math.inf, 0.0]])
    assert count_correct(logits, torch.tensor([0, 0, 1, 0, 0])) == 1
    assert accuracy(torch.full((3, 2), nan), torch.zeros(3, dtype=torch.int64)) == 0


def test_counts_of_batches_add_up_to_the_whole(generator: torch.Generator) -> None:
    logits = torch.randn(70, 4, generator=generator)
    labels = torch.randint(4, (70,), generator=generator)
    parts = zip(logits.split(32), labels.split(32), strict=True)
    assert sum(count_correct(x, y) for x, y in parts) / 70 == accuracy(logits, labels)


@pytest.mark.parametrize("shape", [(3,), (3, 1), ()])
def test_shapes_that_would_broadcast_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="expected"):
        count_correct(torch.zeros(2, 3), torch.zeros(shape, dtype=torch.int64))


def test_arrays_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="logits as ndarray"):
        accuracy(np.zeros((2, 3)), np.zeros(2))  # type: ignore[arg-type]


def test_accuracy_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no examples"):
        accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_interval_from_the_table() -> None:
    # Standard deviation 1, three values: 4.303 / sqrt(3) by any table of Student's t.
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


@given(st.lists(FINITE, min_size=2, max_size=9))
def test_interval_agrees_with_numpy_and_scipy(values: list[float]) -> None:
    mean, half = mean_interval(values)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert half == pytest.approx(error * scipy.stats.t.ppf(0.975, len(values) - 1), abs=1e-9)
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_one_run_has_no_interval() -> None:
    assert mean_interval([0.5]) == (0.5, None)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_a_mean_needs_finite_numbers(values: list[float]) -> None:
    with pytest.raises(DataError, match="finite"):
        mean_interval(values)


def test_pairing_removes_what_the_runs_share() -> None:
    a, b = [0.91, 0.50, 0.72], [0.90, 0.48, 0.72]
    mean, half = paired_interval(a, b)
    assert mean == pytest.approx(0.01)
    assert half == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-5)
    unpaired = mean_interval(a)[1]
    assert unpaired is not None
    assert half is not None
    assert half < unpaired / 5


def test_pairs_must_match() -> None:
    with pytest.raises(DataError, match="equally many"):
        paired_interval([1.0, 2.0], [1.0])
