"""The guess without any gradient: class means of public images."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from fedkl.data.images import Images
from fedkl.errors import DataError

PIXELS: Final = 10_000 * 3 * 32 * 32
"""Numbers in public images that are used: 10,000 of 3 x 32 x 32, or 204 of 3 x 224 x 224."""


def few_enough(images: Images) -> Tensor:
    """Positions of as many images as :data:`PIXELS` allows: int64 (M,).

    All of them in their order; or the first ones of every class in turn, one of each at least, for
    image folders are sorted by class.
    """
    most = max(2, PIXELS // math.prod(images.image_shape))
    if len(images) <= most:
        return torch.arange(len(images))
    rows = in_turn(torch.arange(len(images)), images.labels)
    return rows[: max(most, len(torch.unique(images.labels)))]


def in_turn(order: Tensor, labels: Tensor) -> Tensor:
    """Positions (N,) in the order of ``order``, but the classes in turn; ``labels`` (N,) of all."""
    mine = labels[order]
    rank = torch.zeros_like(mine)
    for label in torch.unique(mine):
        where = (mine == label).nonzero().flatten()
        rank[where] = torch.arange(len(where))
    return order[torch.argsort(rank, stable=True)]


def class_means(images: Images, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean image per class (classes, C, H, W), and how many images it is of (classes,).

    Of as many images as are used (:func:`few_enough`). A class without images has the mean of all.
    """
    rows = few_enough(images)
    sums = torch.zeros(num_classes, *images.image_shape, dtype=torch.float64)
    for part in torch.split(rows, 1000):
        x, y = images.batch(part)
        sums.index_add_(0, y, x.double())
    counts = torch.bincount(images.labels[rows], minlength=num_classes)
    means = sums / counts.clamp_min(1).view(-1, 1, 1, 1)
    means[counts == 0] = sums.sum(dim=0) / max(1, len(rows))
    return means.float(), counts


def floor_of(images: Images, num_classes: int, labels: Tensor) -> Tensor:
    """The class mean for each of ``labels`` (N,): (N, C, H, W) in [0, 1].

    Raises:
        DataError: There is no public image of a class.
    """
    means, counts = class_means(images, num_classes)
    if missing := torch.unique(labels[counts[labels] == 0]).tolist():
        raise DataError(
            f"got labels {missing}, of which there is no public image; give a data set with public "
            "images of every class that is attacked."
        )
    return means[labels]
