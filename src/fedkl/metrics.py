"""Accuracy, and means with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import scipy.stats
from torch import Tensor

from fedkl.errors import DataError

_LEVEL = 0.95


def count_correct(logits: Tensor, labels: Tensor) -> int:
    """How many of the rows of ``logits`` (B, classes) are largest at ``labels`` (B,).

    A count, not a fraction: the last batch of an epoch may be smaller than the others.

    Raises:
        DataError: the shapes do not belong together.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise DataError(
            f"got logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; "
            "expected (B, classes) and (B,)."
        )
    return int((logits.argmax(dim=1) == labels).sum().item())


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction in [0, 1] of the rows of ``logits`` (B, classes) that are largest at ``labels``.

    Raises:
        DataError: the shapes do not belong together, or there is no row.
    """
    if len(labels) == 0:
        raise DataError("accuracy of no examples; give at least one row of logits.")
    return count_correct(logits, labels) / len(labels)


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % confidence interval (Student's t, n - 1 degrees).

    The half width is ``None`` for a single value: one run says nothing about the spread.

    Raises:
        DataError: there is no value, or one of them is not finite.
    """
    n = len(values)
    if n == 0 or not all(math.isfinite(value) for value in values):
        raise DataError(f"got {list(values)}; a mean needs one or more finite numbers.")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    quantile = float(scipy.stats.t.ppf((1 + _LEVEL) / 2, n - 1))
    return mean, quantile * math.sqrt(variance / n)


def paired_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float | None]:
    """:func:`mean_interval` of the differences ``a[i] - b[i]``, runs of the same seed paired.

    Raises:
        DataError: the lengths differ, there is no pair, or a number is not finite.
    """
    if len(a) != len(b):
        raise DataError(f"got {len(a)} and {len(b)} values; paired runs must be equally many.")
    return mean_interval([x - y for x, y in zip(a, b, strict=True)])
