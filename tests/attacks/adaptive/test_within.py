"""Coordinates in which images of one class differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedkl.attacks.adaptive.within import Within
from fedkl.errors import AttackError
from fedkl.rng import derive


def cloud(count: int = 300, size: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator, labels = derive(0, "within"), torch.arange(count) % classes
    centers = 5 * torch.randn(classes, size, generator=generator)
    mixed = torch.randn(size, size, generator=generator)
    return centers[labels] + torch.randn(count, size, generator=generator) @ mixed, labels


def test_within_a_class_every_direction_has_unit_deviation_and_none_tells_of_another() -> None:
    x, labels = cloud()
    white = Within(x, labels, 3, 6)(x, labels)
    torch.testing.assert_close(white.T @ white / len(x), torch.eye(6), rtol=1e-3, atol=1e-3)
    for k in range(3):
        assert float(white[labels == k].mean(dim=0).abs().max()) < 1e-4


def test_the_widest_directions_come_first_and_the_whole_is_lifted_back() -> None:
    x, labels = cloud()
    within = Within(x, labels, 3, 6)
    assert within.deviation.tolist() == sorted(within.deviation.tolist(), reverse=True)
    torch.testing.assert_close(within.lift(within.whole(x)), x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(within.classes, within.whole(within.means))
    short = Within(x, labels, 3, 2)
    torch.testing.assert_close(short(x, labels), within(x, labels)[:, :2], rtol=1e-3, atol=1e-3)


def test_a_ridge_weighs_narrow_directions_less() -> None:
    x, labels = cloud()
    plain, ridged = Within(x, labels, 3, 6), Within(x, labels, 3, 6, ridge=0.5)
    variance = plain.deviation.square()
    wanted = (variance / (variance + 0.5 * variance.mean())).sqrt()
    torch.testing.assert_close(ridged(x, labels), plain(x, labels) * wanted, rtol=1e-3, atol=1e-3)


def test_directions_without_deviation_and_classes_without_an_example() -> None:
    x, labels = cloud()
    flat = torch.cat([x, x[:, :2].sum(dim=1, keepdim=True), torch.ones(len(x), 1)], dim=1)
    within = Within(flat, labels, 5, 8)
    assert within.whiten.count_nonzero() == 6
    assert bool(within(flat, labels).isfinite().all())
    torch.testing.assert_close(within.means[4], flat.mean(dim=0))


def test_what_is_no_number_is_refused() -> None:
    x, labels = cloud()
    x[3, 2] = torch.inf
    with pytest.raises(AttackError, match="NaN or Inf"):
        Within(x, labels, 3, 6)
