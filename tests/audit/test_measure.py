"""Figures of batches: what matching by the truth must not add to them."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkl import metrics
from fedkl.attacks import Reconstruction
from fedkl.audit.measure import Truth, identified_in_batches, matched, rows_of
from fedkl.metrics import draw_decoys

SIZE, COUNT, DECOYS = 16, 480, 9


def truth_of_noise(generator: torch.Generator) -> Truth:
    """Images of one class that have nothing in common."""
    pool = torch.rand(2000, 1, 6, 6, generator=generator)
    labels = torch.zeros(COUNT, dtype=torch.int64)
    own = torch.arange(COUNT)
    everyone = torch.zeros(len(pool), dtype=torch.int64)
    decoys = draw_decoys(labels, everyone, generator=generator, own=own, count=DECOYS)
    x = pool[:COUNT]
    names = ("mse", "ssim", "ssim_aligned", "identified", "success")
    zeros = {name: torch.zeros(COUNT) for name in names}
    return Truth(own, x, labels, x * 0, decoys, pool, zeros)


def rows(x: Tensor, truth: Truth) -> tuple[list[Reconstruction], Tensor]:
    labels = torch.zeros(1, SIZE, dtype=torch.int64)
    found = [Reconstruction(images=part[None], labels=labels) for part in x.split(SIZE)]
    return found, matched(found, truth)[0]


def test_guesser_is_right_as_often_as_chance_has_it() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = truth_of_noise(generator)
    guess = torch.rand(COUNT, 1, 6, 6, generator=generator)
    found, images = rows(guess, truth)
    labels, chance = truth.labels, 1 / (DECOYS + 1)
    made = rows_of(found, images, labels, truth, {})
    rate = sum(row["identified"] for row in made) / COUNT
    assert abs(rate - chance) < 0.05
    # What matching alone makes of the same guesses.
    matched_rate = float(
        metrics.identified(images, truth.images, truth.pool, truth.decoys).double().mean()
    )
    assert matched_rate > 2 * chance


def test_reconstructions_in_any_order_are_identified() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = truth_of_noise(generator)
    near = (truth.images + 0.05 * torch.randn(truth.images.shape, generator=generator)).clamp(0, 1)
    turned = torch.cat([part.flip(0) for part in near.split(SIZE)])
    assert bool(identified_in_batches(turned, truth, SIZE).all())
