"""The guess without any gradient: class means of public images, never all in memory at once."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fedkl.data.images import Images
from fedkl.errors import DataError

PIXELS: Final = 20_000_000  # read at a time


def class_means(images: Images, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean image per class (classes, C, H, W), and how many images it is of (classes,).

    A class without images has the mean of all.
    """
    size = int(torch.tensor(images.image_shape).prod())
    sums = torch.zeros(num_classes, *images.image_shape, dtype=torch.float64)
    for rows in torch.split(torch.arange(len(images)), max(1, PIXELS // size)):
        x, y = images.batch(rows)
        sums.index_add_(0, y, x.double())
    counts = torch.bincount(images.labels, minlength=num_classes)
    means = sums / counts.clamp_min(1).view(-1, 1, 1, 1)
    means[counts == 0] = sums.sum(dim=0) / max(1, len(images))
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
