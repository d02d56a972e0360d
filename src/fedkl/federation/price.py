"""What presentations under one pad cost: how many images our best attacker found of so many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Point:
    """One measured point.

    Up to 64 images of ``results/relations.md`` (shadow, both; at one length the better of weights
    and shape of one, and pairs), from 256 on of ``results/breakpad.md`` (replay, shadow,
    candidates), which no length changes.

    Attributes:
        images: Images under one pad, each a gradient of its own.
        lenet, resnet20: Percent of them that the attack that does best there, ``replay-relations``
            or ``replay-matched``, picked from 100 images of their class, under the default pad:
            the mean over three federations. Of more images none has less than of fewer, since an
            attacker may take them in groups.
    """

    images: int
    lenet: float
    resnet20: float


FOUND: Final = (
    Point(1, 2.1, 3.6),
    Point(16, 6.7, 8.2),
    Point(64, 9.5, 12.3),
    Point(256, 10.3, 12.3),
    Point(1_000, 49.3, 35.7),
    Point(2_000, 63.9, 68.0),
)


AT_ONE_LENGTH: Final = (
    Point(1, 1.3, 1.1),
    Point(16, 5.0, 6.0),
    Point(64, 5.6, 10.7),
    Point(256, 10.3, 10.7),
    *FOUND[-2:],
)


def price(presentations: int, *, at_length: bool = False) -> str:
    """One sentence: what was found at the nearest measured number at or above ``presentations``.

    Above the largest number it is that of the largest. Updates of several images or steps were
    not measured. ``at_length``: every update is sent at one length (:func:`fedkl.at_length`).
    """
    table = AT_ONE_LENGTH if at_length else FOUND
    point = next((p for p in table if p.images >= presentations), table[-1])
    aside = " and at one length" if at_length else ""
    if point.images > presentations:
        aside += ", the next number that was measured,"
    elif point.images < presentations:
        aside += " already"
    images = "one image" if point.images == 1 else f"{point.images:,} images"
    return (
        f"Of {images} under one pad{aside} our best attack found "
        f"{_percent(point.lenet)} on LeNet and {_percent(point.resnet20)} on ResNet-20, where "
        "guessing finds 1 % (docs/findings.md)."
    )


def _percent(value: float) -> str:
    return f"{value:.1f} %" if value < 10 else f"{value:.0f} %"
