"""Encoders that meet: they find what a gradient tells, and nothing where it tells nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedkl.attacks.adaptive.dual_encoder import BATCH, LENGTH, DualEncoder
from fedkl.rng import derive


def hits(inputs: Tensor, images: Tensor, labels: Tensor) -> float:
    """How often the last 100 of 600 images are picked out of 20, having learned on the others."""
    encoder = DualEncoder(inputs.shape[1], tuple(images.shape[1:]), 2, derive(0, "encoders"))
    encoder.fit(inputs[:500], labels[:500], images[:500], epochs=30)
    victims = torch.arange(500, 600)
    others = torch.randint(500, (100, 19), generator=derive(0, "others"))
    pool = encoder.embed(images)[torch.cat([victims[:, None], others], dim=1)]
    scores = torch.einsum("nd,nkd->nk", encoder.read(inputs[500:], labels[500:]), pool)
    return float((scores.argmax(dim=1) == 0).double().mean())


@pytest.mark.slow
def test_images_are_found_by_what_tells_them_and_guessed_by_what_does_not() -> None:
    generator = derive(0, "told")
    images = torch.rand(600, 1, 8, 8, generator=generator)
    labels = torch.arange(600) % 2
    told = (images.flatten(1) - 0.5) @ torch.randn(64, 48, generator=generator)
    assert hits(told, images, labels) > 0.5
    silent = torch.randn(600, 48, generator=generator)
    assert hits(silent, images, labels) < 0.2  # chance is 1 in 20


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (1, 33, 20), (3, 96, 96)])
def test_any_size_of_image_has_an_embedding_of_unit_length(shape: tuple[int, ...]) -> None:
    encoder = DualEncoder(5, shape, 3, derive(0))
    embedded = encoder.embed(torch.rand(4, *shape, generator=derive(1)))
    assert embedded.shape == (4, LENGTH)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(4))
    # Large images are averaged first: the layer behind them has at most 16 positions.
    assert max(p.numel() for p in encoder.of_images.parameters()) <= 128 * 16 * 512


def test_every_epoch_is_told_and_the_generator_decides_all() -> None:
    x, y = torch.rand(64, 1, 8, 8, generator=derive(0)), torch.arange(64) % 4
    sketches = torch.randn(64, 6, generator=derive(1))
    told: list[float] = []
    made = []
    for seed in (0, 0, 1):
        encoder = DualEncoder(6, (1, 8, 8), 4, derive(seed))
        encoder.fit(sketches, y, x, 3, told.append)
        made.append(encoder.embed(x))
    assert len(told) == 9
    assert all(loss > 0 for loss in told)
    assert made[0].equal(made[1])
    assert not made[0].equal(made[2])


@pytest.mark.parametrize("classes, each", [(10, 60), (7, 30), (100, 3), (3, 1)])
def test_the_rate_falls_over_all_of_training(
    classes: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many classes: it is above zero to the last step, and ends near it."""
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    count = classes * each
    encoder = DualEncoder(4, (1, 8, 8), classes, derive(0))
    images = torch.rand(count, 1, 8, 8, generator=derive(1))
    sketches = torch.randn(count, 4, generator=derive(2))
    encoder.fit(sketches, torch.arange(count) % classes, images, 10)
    assert len(rates) == 10 * -(-count // BATCH)
    assert rates == sorted(rates, reverse=True)
    assert min(rates) > 0
    assert rates[-1] < 0.1 * rates[0]


def test_labels_alone_tell_no_image_from_another() -> None:
    """Batches are of few classes, candidates of one: knowing the class is worth nothing."""
    encoder = DualEncoder(2, (1, 8, 8), 10, derive(0))
    labels = torch.arange(1280) % 10
    batches = encoder._batches(labels)
    assert sorted(torch.cat(batches).tolist()) == list(range(1280))
    assert [len(rows) for rows in batches] == [256] * 5
    assert all(len(labels[rows].unique()) == 2 for rows in batches)
    encoder.of_gradients.eval()  # no dropout
    loss = encoder._loss(torch.zeros(60, 2), labels[:60], torch.zeros(60, 1, 8, 8))
    # Six images a class, all alike: each is found once in six.
    torch.testing.assert_close(loss, 2 * torch.tensor(6.0).log())
