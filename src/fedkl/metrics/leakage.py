"""Does a reconstruction tell more than a guess: floor, success, identification, matching."""

from __future__ import annotations

import scipy.optimize
import torch
from torch import Tensor

from fedkl.errors import DataError, number_of
from fedkl.metrics.images import check_images, check_pair, check_tensor

# Distances that differ by less than this fraction differ by rounding alone.
_ROUNDING = 1e-9


def success(ssim: Tensor, threshold: float = 0.6) -> Tensor:
    """Which of the SSIM values (N,) reach ``threshold``: bool (N,).

    0.6 is the key-lock paper's rule. The class mean alone reaches it on 10–19 % of
    Fashion-MNIST: print the floor's rate beside every rate.

    Raises:
        DataError: not (N,), or a value or the threshold is not within [-1, 1].
    """
    check_tensor("SSIM values", ssim)
    # The mean over pixels may exceed 1 by rounding.
    if ssim.ndim != 1 or not bool((ssim.abs() <= 1 + _ROUNDING).all()):
        raise DataError(
            f"got SSIM values of shape {tuple(ssim.shape)}; expected (N,), each within [-1, 1]."
        )
    if not -1 <= threshold <= 1:
        raise DataError(f"got threshold {threshold}; an SSIM threshold lies within [-1, 1].")
    return ssim >= threshold


def class_mean_floor(public_images: Tensor, public_labels: Tensor, labels: Tensor) -> Tensor:
    """The guess without any gradient: for every label the mean public image of that class.

    ``public_images`` (M, C, H, W) in [0, 1], ``public_labels`` (M,) and ``labels`` (N,) integer;
    the result is (N, C, H, W) in the dtype of ``public_images``.

    Raises:
        DataError: wrong shapes or ranges, or a label of which there is no public image.
    """
    check_images("public images", public_images)
    _check_labels("public labels", public_labels, len(public_images))
    _check_labels("labels", labels)
    classes, place = torch.unique(labels, return_inverse=True)
    means = []
    for label in classes.tolist():
        mine = public_labels == label
        if not bool(mine.any()):
            raise DataError(
                f"got label {label}, of which there is no public image; "
                "give public images of every class that is attacked."
            )
        means.append(public_images[mine].double().mean(dim=0))
    return torch.stack(means)[place].to(public_images.dtype)


def draw_decoys(
    labels: Tensor,
    pool_labels: Tensor,
    *,
    generator: torch.Generator,
    own: Tensor | None = None,
    count: int = 99,
) -> Tensor:
    """For every image ``count`` others of its class, drawn without replacement: (N, count) int64.

    The result indexes the pool that ``pool_labels`` (M,) belong to, for :func:`identified`.
    ``labels`` (N,) are the true classes; ``own`` (N,) says where in the pool each true image
    itself is (-1: nowhere), so that it is never its own decoy, or (N, M) where all M images of its
    update are, none of which is.

    Raises:
        DataError: wrong shapes, ``count`` < 1, or a class with too few images in the pool.
    """
    _check_labels("labels", labels)
    _check_labels("pool labels", pool_labels)
    if own is not None:
        _check_labels(
            "own places", own[:, 0] if own.ndim == 2 and own.shape[1] else own, len(labels)
        )
    if count < 1:
        raise DataError(f"got count {count}; identification needs one decoy or more.")
    rows = []
    for position, label in enumerate(labels.tolist()):
        others = (pool_labels == label).nonzero().flatten().cpu()
        if own is not None:
            others = others[~torch.isin(others, own[position].cpu())]
        if len(others) < count:
            raise DataError(
                f"got {number_of(len(others), 'other image')} of class {label}, expected {count} "
                "or more; give a larger pool or ask for fewer decoys."
            )
        rows.append(others[torch.randperm(len(others), generator=generator)[:count]])
    return torch.stack(rows)


def identified(reconstructions: Tensor, truths: Tensor, pool: Tensor, decoys: Tensor) -> Tensor:
    """For which images the truth is nearer (Euclidean) than all K - 1 decoys: bool (N,).

    ``reconstructions`` and ``truths`` (N, C, H, W), ``pool`` (M, C, H, W), all in [0, 1];
    ``decoys`` (N, K - 1) int64 indexes ``pool``, as :func:`draw_decoys` gives it. Whoever guesses
    is right 1 time in K. A tie, exact or within rounding, counts as not identified.

    Raises:
        DataError: wrong shapes, values outside [0, 1], or an index outside the pool.
    """
    guess, truth = check_pair(reconstructions, truths)
    check_images("pool", pool)
    check_tensor("decoys", decoys)
    if pool.shape[1:] != truth.shape[1:]:
        raise DataError(
            f"got a pool of {tuple(pool.shape[1:])} and truths of {tuple(truth.shape[1:])}; "
            "expected candidates of the same channels and size."
        )
    if decoys.ndim != 2 or len(decoys) != len(truth) or decoys.shape[1] == 0:
        raise DataError(
            f"got decoys {tuple(decoys.shape)}; expected ({len(truth)}, K - 1) with K > 1."
        )
    if decoys.dtype != torch.int64 or int(decoys.min()) < 0 or int(decoys.max()) >= len(pool):
        raise DataError(f"got decoys that are not int64 indices within 0 … {len(pool) - 1}.")
    result = [
        _squared_distance(mine, true) * (1 + _ROUNDING)
        < _squared_distance(mine, pool[others].double()).min()
        for mine, true, others in zip(guess, truth, decoys, strict=True)
    ]
    return torch.stack([nearest.squeeze() for nearest in result])


def best_matching(reconstructions: Tensor, truths: Tensor) -> Tensor:
    """Permutation (B,) int64 for which ``reconstructions[permutation]`` fits ``truths`` best.

    A gradient does not tell the order within a batch. The sum of the B squared errors is the
    least of all permutations (Hungarian method, scipy). This looks at the truth: match the floor
    alike.

    Raises:
        DataError: not two float batches (B, C, H, W) in [0, 1] of one shape.
    """
    guess, truth = check_pair(reconstructions, truths)
    cost = torch.stack([_squared_distance(true, guess) for true in truth])
    _, order = scipy.optimize.linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(order, dtype=torch.int64, device=reconstructions.device)


def _squared_distance(image: Tensor, others: Tensor) -> Tensor:
    """Of one image (C, H, W) from others (..., C, H, W): (...,)."""
    return (others - image).square().sum(dim=(-3, -2, -1))


def _check_labels(name: str, labels: Tensor, count: int | None = None) -> None:
    check_tensor(name, labels)
    expected = f"({'N' if count is None else count},)"
    wrong = labels.ndim != 1 or len(labels) == 0 or (count is not None and len(labels) != count)
    if wrong or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"got {name} {tuple(labels.shape)} of {labels.dtype}; expected integers {expected}."
        )
