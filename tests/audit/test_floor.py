"""The guess without any gradient."""

from __future__ import annotations

import pytest
import torch

from fedkl import metrics
from fedkl.audit.floor import class_means, few_enough, floor_of
from fedkl.data.images import TensorImages
from fedkl.errors import DataError


def some(count: int, size: int = 8, channels: int = 1) -> TensorImages:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 1, 8, 8), generator=generator).to(torch.uint8)
    labels = torch.arange(count) % 3
    return TensorImages(pixels, labels, channels=channels, image_size=size)


def test_means_are_those_of_the_metric() -> None:
    images = some(2500)  # more than are read at a time
    x, y = images.batch(torch.arange(len(images)))
    labels = torch.tensor([2, 0, 1, 2])
    expected = metrics.class_mean_floor(x, y, labels)
    torch.testing.assert_close(floor_of(images, 3, labels), expected, atol=1e-6, rtol=0)


def test_class_without_images() -> None:
    images = some(30)
    means, counts = class_means(images, 5)
    assert counts.tolist() == [10, 10, 10, 0, 0]
    torch.testing.assert_close(means[4], means[:3].mean(dim=0), atol=1e-6, rtol=0)
    with pytest.raises(DataError, match=r"labels \[4\]"):
        floor_of(images, 5, torch.tensor([0, 4]))


@pytest.mark.parametrize("size, channels, count", [(32, 3, 2500), (224, 3, 204), (224, 1, 612)])
def test_large_images_are_fewer(size: int, channels: int, count: int) -> None:
    """10,000 images of 3 x 224 x 224 would be 6 GB."""
    assert few_enough(some(2500, size, channels)).tolist() == list(range(count))


def test_of_large_images_sorted_by_class_there_are_some_of_each() -> None:
    """As image folders have them; the guess for the others was an error."""
    count, classes = 2500, 300
    pixels = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    labels = (torch.arange(count) % classes).sort().values
    images = TensorImages(pixels, labels, channels=3, image_size=224)
    rows = few_enough(images)
    assert len(rows) == classes  # more than the 204 there would be
    assert sorted(labels[rows].tolist()) == list(range(classes))
    few = TensorImages(pixels, labels // 100, channels=3, image_size=224)
    assert torch.bincount(few.labels[few_enough(few)]).tolist() == [68, 68, 68]
