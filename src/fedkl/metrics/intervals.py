"""Means and proportions with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import scipy.stats
from torch import Tensor

from fedkl.errors import DataError
from fedkl.metrics.images import check_tensor

_LEVEL = 0.95


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


def advantage(attack: Tensor, floor: Tensor) -> tuple[float, float | None]:
    """Mean of ``attack - floor`` and half width of its 95 % interval, image by image.

    ``attack`` and ``floor`` (N,) hold the same metric of the same N images, reconstructed by the
    attack and guessed without any gradient; booleans count as 0 and 1. Positive is better for the
    attacker where more of the metric is better (SSIM, PSNR, identification); for MSE and LPIPS it
    is the other way round. The half width is ``None`` for a single image.

    The interval is Student's t, in which values that are all alike have a width of 0; bound the
    few or no successes of a rate with :func:`proportion_interval`.

    Raises:
        DataError: the shapes are not both (N,), N is 0, or a value is not finite (the PSNR of an
            exact reconstruction is not).
    """
    check_tensor("values", attack)
    check_tensor("a floor", floor)
    if attack.ndim != 1 or attack.shape != floor.shape:
        raise DataError(
            f"got values of shape {tuple(attack.shape)} and a floor of shape "
            f"{tuple(floor.shape)}; expected (N,) twice, one value per image."
        )
    return paired_interval(attack.double().tolist(), floor.double().tolist())


def proportion_interval(successes: int, n: int) -> tuple[float, float]:
    """Lower and upper 95 % bound in [0, 1] of a rate seen as ``successes`` out of ``n``.

    Clopper and Pearson, Biometrika 26 (1934): covers at least 95 % for every rate and every n,
    also with no success at all, so that a verdict is never better than the data.

    Raises:
        DataError: ``n`` is not positive, or ``successes`` is not within 0 … ``n``.
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(
            f"got {successes} successes out of {n}; expected 0 <= successes <= n, n > 0."
        )
    tail = (1 - _LEVEL) / 2
    failures = n - successes
    low = scipy.stats.beta.ppf(tail, successes, failures + 1) if successes else 0.0
    high = scipy.stats.beta.ppf(1 - tail, successes + 1, failures) if failures else 1.0
    return float(low), float(high)
