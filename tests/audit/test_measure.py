"""Figures of batches: what matching by the truth must not add to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from audithelp import small_audit
from torch import Tensor

from fedkl import metrics
from fedkl.attacks import Reconstruction
from fedkl.audit.floor import class_means
from fedkl.audit.measure import (
    Truth,
    figures_of,
    identified_in_batches,
    matched,
    picked,
    rows_of,
    truth_of,
)
from fedkl.data import DataBundle
from fedkl.data.images import TensorImages
from fedkl.errors import AttackError, DataError
from fedkl.metrics import draw_decoys
from fedkl.rng import derive

SIZE, COUNT, DECOYS = 16, 480, 9


def truth_of_noise(generator: torch.Generator) -> Truth:
    """Images of one class that have nothing in common."""
    pool = torch.rand(2000, 1, 6, 6, generator=generator)
    labels = torch.zeros(COUNT, dtype=torch.int64)
    own = torch.arange(COUNT)
    everyone = torch.zeros(len(pool), dtype=torch.int64)
    updates = own.view(-1, SIZE).repeat_interleave(SIZE, dim=0)
    decoys = draw_decoys(labels, everyone, generator=generator, own=updates, count=DECOYS)
    x = pool[:COUNT]
    names = ("mse", "ssim", "ssim_aligned", "identified", "success")
    zeros = {name: torch.zeros(COUNT) for name in names}
    return Truth(own, x, labels, x * 0, decoys, pool, torch.arange(len(pool)), zeros)


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


def bundle_of(images: Tensor, labels: Tensor) -> DataBundle:
    pixels = (images * 255).round().to(torch.uint8)
    every = TensorImages(pixels, labels, channels=1, image_size=images.shape[-1])
    return DataBundle(
        "made up", 2, ("a", "b"), every.image_shape, every, every, every, every, "here"
    )


def test_floor_of_a_batch_is_matched_as_reconstructions_are() -> None:
    """Whoever guesses the floor has no advantage over it, in batches either."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 2
    # The classes differ little and their images a lot: another order than the labels' fits better.
    base = torch.stack([torch.zeros(8, 8), torch.full((8, 8), 0.05)])[labels, None]
    images = (base + 0.9 * torch.rand(240, 1, 8, 8, generator=generator)).clamp(0, 1)
    bundle = bundle_of(images, labels)
    audit = small_audit(images=15, batch_size=8, candidates=10)
    truth = truth_of(bundle, torch.arange(120).view(15, 1, 8), audit)
    means, _ = class_means(bundle.public, 2)
    told = means[truth.labels]
    assert not truth.floor.equal(told)
    matched_error = float((truth.floor - truth.images).square().sum())
    assert matched_error < float((told - truth.images).square().sum())
    guesses = [
        Reconstruction(images=x.flip(0)[None], labels=torch.zeros(1, 8, dtype=torch.int64))
        for x in told.split(8)
    ]
    mine, found = matched(guesses, truth)
    made = rows_of(guesses, mine, found, truth, {})
    assert max(abs(row["advantage"]) for row in made) < 1e-6
    for row in made:
        assert row["identified"] == row["floor_identified"]
    # With every guess at its own label's place the same guesser would seem to be ahead.
    figures = figures_of(told, truth.images, truth.pool, truth.decoys)
    assert float(figures["mse"].mean()) > sum(row["mse"] for row in made) / len(made)


def test_pool_holds_what_is_needed_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    bundle = bundle_of(torch.rand(240, 1, 8, 8, generator=generator), torch.arange(240) % 2)
    audit = small_audit(images=2, candidates=10)
    truth = truth_of(bundle, torch.tensor([5, 8]).view(2, 1, 1), audit)
    assert len(truth.pool) <= 18
    for i, places in enumerate(truth.decoys):
        others = truth.pool_rows[places]
        assert len(set(others.tolist())) == 9
        assert int(truth.rows[i]) not in others.tolist()
        assert (bundle.test.labels[others] == truth.labels[i]).all()
        assert truth.pool[places].equal(bundle.test.batch(others)[0])


def test_no_candidate_is_lost_to_the_batch() -> None:
    """Among K candidates is among K: those of the same update are replaced, not dropped."""
    generator = torch.Generator().manual_seed(0)
    bundle = bundle_of(torch.rand(240, 1, 8, 8, generator=generator), torch.arange(240) % 2)
    audit = small_audit(images=3, batch_size=8, observations=2, candidates=100)
    rows = torch.randperm(240, generator=generator)[:48].view(3, 2, 8)
    truth = truth_of(bundle, rows, audit)
    assert truth.decoys.shape == (48, 99)
    for i, places in enumerate(truth.decoys):
        others = truth.pool_rows[places]
        update = rows.view(6, 8)[i // 8]
        assert len(others.unique()) == 99
        assert not torch.isin(others, update).any()
        assert (bundle.test.labels[others] == truth.labels[i]).all()


def test_decoys_of_single_images_are_drawn_as_ever() -> None:
    generator = torch.Generator().manual_seed(0)
    bundle = bundle_of(torch.rand(240, 1, 8, 8, generator=generator), torch.arange(240) % 2)
    audit, rows = small_audit(images=6, candidates=10), torch.tensor([3, 9, 8, 200, 41, 0])
    truth = truth_of(bundle, rows.view(3, 2, 1), audit)
    plain = draw_decoys(
        bundle.test.labels[rows],
        bundle.test.labels,
        generator=derive(0, "decoys"),
        own=rows,
        count=9,
    )
    assert truth.pool_rows[truth.decoys].equal(plain)
    # As committed results have them.
    assert plain[0].tolist() == [191, 93, 97, 15, 39, 135, 141, 5, 33]


def test_exact_images_count_in_the_mean() -> None:
    """Of infinity there is no mean, and leaving the best out would make an attack look worse."""
    truth = truth_of_noise(torch.Generator().manual_seed(0))
    figures = figures_of(truth.images, truth.images, truth.pool, truth.decoys)
    assert float(figures["psnr"].min()) == float(figures["psnr"].max()) == 100
    assert float(figures["paper_psnr"].max()) == pytest.approx(74.0654, abs=1e-3)
    off = (truth.images + 0.1).clamp(0, 1)
    assert float(figures_of(off, truth.images, truth.pool, truth.decoys)["psnr"].max()) < 40


@pytest.mark.parametrize("side", [8, 30, 31, 32])
def test_damaged_weights_of_lpips_are_an_error_and_small_images_are_none(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column that is there on one machine must not vanish on another without a word."""
    from torchvision.models import AlexNet_Weights

    weights = tmp_path / "checkpoints" / AlexNet_Weights.DEFAULT.url.rpartition("/")[2]
    weights.parent.mkdir()
    weights.write_bytes(b"cut")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    x = torch.rand(40, 1, side, side, generator=torch.Generator().manual_seed(0))
    bundle = bundle_of(x, torch.arange(40) % 2)
    rows, audit = torch.tensor([5, 8]).view(2, 1, 1), small_audit(images=2, candidates=10)
    if side < 31:
        assert "lpips" not in truth_of(bundle, rows, audit).floor_figures
        return
    with pytest.raises(DataError, match=r"cannot be read .* get it anew, or remove it"):
        truth_of(bundle, rows, audit)


def test_who_scores_candidates_is_asked_instead_of_compared() -> None:
    """The picture may be anybody's; what counts is which candidate the attack says it was."""
    generator = torch.Generator().manual_seed(0)
    truth = truth_of_noise(generator)
    labels = torch.zeros(2, 1, dtype=torch.int64)

    def victim(first: int, *, knows: bool) -> Reconstruction:
        """Two updates, of images ``first`` and ``first + 1``; the other way round if not known."""

        def score(update: int, candidates: Tensor) -> Tensor:
            own = truth.images[first + (update if knows else 1 - update)]
            return -(candidates - own).flatten(1).square().sum(dim=1)

        return Reconstruction(images=torch.zeros(2, 1, 1, 6, 6), labels=labels, score=score)

    found = [victim(place, knows=place % 4 == 0) for place in range(0, COUNT, 2)]
    made = rows_of(found, torch.zeros(COUNT, 1, 6, 6), truth.labels, truth, {})
    right = [row["identified"] for row in made]
    assert all(right[0::4])
    assert all(right[1::4])
    assert sum(right[2::4]) < 0.3 * len(right[2::4])  # chance is 1 in 10
    flat = Reconstruction(
        images=torch.zeros(1, 1, 1, 6, 6), labels=labels[:1], score=lambda _, x: x.new_zeros(len(x))
    )
    undecided = rows_of([flat] * COUNT, torch.zeros(COUNT, 1, 6, 6), truth.labels, truth, {})
    assert not any(row["identified"] for row in undecided)


@pytest.mark.parametrize("first", [True, False])
def test_place_among_the_candidates_tells_nothing(first: bool) -> None:
    truth = truth_of_noise(torch.Generator().manual_seed(0))
    labels = torch.zeros(1, 1, dtype=torch.int64)

    def score(update: int, candidates: Tensor) -> Tensor:
        return torch.arange(len(candidates)) * (-1.0 if first else 1.0)

    found = [Reconstruction(images=torch.zeros(1, 1, 1, 6, 6), labels=labels, score=score)] * COUNT
    assert abs(float(picked(found, truth).mean()) - 1 / (DECOYS + 1)) < 0.05


def test_an_attack_that_looks_at_everybodys_candidates_is_asked_once_for_all() -> None:
    truth = truth_of_noise(torch.Generator().manual_seed(0))
    truth = replace(truth, labels=torch.arange(COUNT))
    asked: list[int] = []

    def together(candidates: Sequence[Tensor], classes: Tensor) -> list[Tensor]:
        asked.append(len(candidates))
        assert classes.equal(truth.labels)
        # Every other victim's truth is known.
        return [
            (x == truth.images[i]).flatten(1).all(dim=1).float() * (-1) ** i
            for i, x in enumerate(candidates)
        ]

    one = Reconstruction(
        images=torch.zeros(1, 1, 1, 6, 6),
        labels=torch.zeros(1, 1).long(),
        score=lambda _, x: x.flatten(1).sum(dim=1),
        together=together,
    )
    hits = picked([one] * COUNT, truth)
    assert asked == [COUNT]
    assert hits.tolist() == [i % 2 == 0 for i in range(COUNT)]


def test_one_score_that_is_no_number_costs_its_victim_alone() -> None:
    truth = truth_of_noise(torch.Generator().manual_seed(0))

    def score(update: int, x: Tensor) -> Tensor:
        return -(x - truth.images[3]).flatten(1).square().sum(dim=1)

    one = Reconstruction(
        images=torch.zeros(1, 1, 1, 6, 6), labels=torch.zeros(1, 1).long(), score=score
    )
    odd = replace(one, score=lambda _, x: torch.full((len(x),), torch.nan))
    found = [one] * 5 + [odd] + [one] * (COUNT - 6)
    made = rows_of(found, torch.zeros(COUNT, 1, 6, 6), truth.labels, truth, {})
    assert [row["victim"] for row in made if row["left_out"] is not None] == [5]
    assert "no numbers" in made[5]["left_out"]
    assert (made[5]["identified"], made[5]["advantage"], made[5]["label_found"]) == (False, 0, None)
    assert made[3]["identified"]
    # Of an update of two images the other one goes with it.

    def together(candidates: Sequence[Tensor], classes: Tensor) -> list[Tensor]:
        odd = [i == 5 for i in range(len(candidates))]
        return [
            torch.full((len(c),), torch.nan if o else 0.0)
            for c, o in zip(candidates, odd, strict=True)
        ]

    two = replace(one, images=torch.zeros(1, 2, 1, 6, 6), score=None, together=together)
    lost = picked([two] * (COUNT // 2), truth).isnan().nonzero().flatten()
    assert lost.tolist() == [4, 5]


@pytest.mark.parametrize("candidates, said", [(34, ""), (35, "--candidates 34 or fewer")])
def test_candidates_are_from_outside_the_update(candidates: int, said: str) -> None:
    """There are 40 of a class, and the update has 7 of them."""
    bundle = bundle_of(torch.rand(80, 1, 8, 8), torch.arange(80) % 2)
    rows = torch.tensor([0, 2, 4, 6, 8, 10, 12, 1]).view(1, 1, 8)
    audit = small_audit(candidates=candidates, batch_size=8)
    if said:
        with pytest.raises(DataError, match=said):
            truth_of(bundle, rows, audit)
    else:
        assert truth_of(bundle, rows, audit).decoys.shape == (8, 33)


def test_scores_that_are_no_numbers_are_no_miss() -> None:
    truth = truth_of_noise(torch.Generator().manual_seed(0))
    one = Reconstruction(images=torch.zeros(1, 1, 1, 6, 6), labels=torch.zeros(1, 1).long())
    bad = replace(one, score=lambda _, x: torch.full((len(x),), torch.nan))
    with pytest.raises(AttackError, match="no numbers"):
        picked([bad] * COUNT, truth)
    with pytest.raises(AttackError, match="for all victims"):
        picked([bad] * (COUNT - 1) + [one], truth)
    batch = replace(bad, images=torch.zeros(1, 2, 1, 6, 6))
    with pytest.raises(AttackError, match="of one image each"):
        picked([batch] * (COUNT // 2), truth)
