"""How many examples a classifier gets right."""

from __future__ import annotations

from torch import Tensor

from fedkl.errors import DataError
from fedkl.metrics.images import check_tensor


def count_correct(logits: Tensor, labels: Tensor) -> int:
    """How many of the rows of ``logits`` (B, classes) are largest at ``labels`` (B,).

    A count, not a fraction: the last batch of an epoch may be smaller than the others. A row with
    NaN is never right.

    Raises:
        DataError: one is no tensor, or the shapes do not belong together.
    """
    check_tensor("logits", logits)
    check_tensor("labels", labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise DataError(
            f"got logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; "
            "expected (B, classes) and (B,)."
        )
    # To argmax NaN is the largest.
    right = (logits.argmax(dim=1) == labels) & ~logits.isnan().any(dim=1)
    return int(right.sum().item())


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction in [0, 1] of the rows of ``logits`` (B, classes) that are largest at ``labels``.

    Raises:
        DataError: as :func:`count_correct`, or there is no row.
    """
    if len(labels) == 0:
        raise DataError("accuracy of no examples; give at least one row of logits.")
    return count_correct(logits, labels) / len(labels)
