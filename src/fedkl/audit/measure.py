"""Reconstructions against the truth and against the guess without any gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedkl import metrics
from fedkl.attacks import Reconstruction
from fedkl.audit.config import AuditConfig
from fedkl.audit.floor import floor_of
from fedkl.data import DataBundle
from fedkl.errors import AttackError, DataError, number_of
from fedkl.rng import derive

PSNR_CEILING: Final = 100.0
"""In dB: an error below 1e-10 is rounding, and infinity would drop out of every mean."""
PAPER_PSNR_CEILING: Final = 10 * math.log10(255**2 / (255 * 1e-5))
"""The paper's figure at the same error."""

LPIPS: Final = "alex"
_NO_NUMBERS: Final = "its scores of the candidates are no numbers."


@dataclass(frozen=True, eq=False)
class Truth:
    """The victims' images, and what a guesser without gradients makes of them.

    Everything is flat over (victims, T, images per update): N images.

    Attributes:
        rows: Test images, (N,).
        images: (N, C, H, W).
        labels: (N,).
        floor: Class mean of the public images, (N, C, H, W).
        decoys: Where in the pool other test images of the same class are, (N, candidates - 1).
        pool: Test images that are somebody's decoys, (M, C, H, W).
        pool_rows: Which test images the pool holds, (M,).
        floor_figures: Metrics of the floor by name, (N,).
    """

    rows: Tensor
    images: Tensor
    labels: Tensor
    floor: Tensor
    decoys: Tensor
    pool: Tensor
    pool_rows: Tensor
    floor_figures: dict[str, Tensor]


def truth_of(bundle: DataBundle, rows: Tensor, audit: AuditConfig) -> Truth:
    """The truth of the victims ``rows`` (victims, T, images).

    The floor is told the true labels, which batch-1 gradients give away: the strongest guesser.
    Within an update its guesses are put in the order that fits the true images best and identified
    as reconstructions are, for an attack is allowed both. Decoys are from outside the image's own
    update, whose other images have reconstructions of their own among those it is compared with.

    Raises:
        DataError: A class has too few images for the candidates asked for, and how many it has; or
            the weights of LPIPS cannot be read.
    """
    flat = rows.flatten()
    _check_enough(bundle, rows, audit)
    images, labels = bundle.test.batch(flat)
    floor = floor_of(bundle.public, bundle.num_classes, labels)
    size = rows.shape[-1]
    decoys = metrics.draw_decoys(
        labels,
        bundle.test.labels,
        generator=derive(audit.run.seed, "decoys"),
        own=rows.flatten(0, -2).repeat_interleave(size, dim=0),
        count=audit.candidates - 1,
    )
    # Of the whole test set at 224 x 224 floats would take gigabytes.
    pool_rows, places = torch.unique(decoys, return_inverse=True)
    pool = bundle.test.batch(pool_rows)[0]
    if size > 1:
        floor = floor[in_order(floor, images, size)]
    truth = Truth(flat, images, labels, floor, places, pool, pool_rows, {})
    return replace(truth, floor_figures=measured(floor, truth, size))


def _check_enough(bundle: DataBundle, rows: Tensor, audit: AuditConfig) -> None:
    """Says how many candidates there can be for ``rows``, in the command line's words."""
    labels = bundle.test.labels
    mine = labels[rows]
    # Other images of its class in the same update are no decoys.
    beside = one_hot(mine, bundle.num_classes).sum(dim=-2).gather(-1, mine) - 1
    counts = torch.bincount(labels)[mine] - beside
    most = int(counts.min())
    if audit.candidates <= most:
        return
    outside = " and outside of one update" if int(beside.max()) else ""
    raise DataError(
        f"the true image is to be found among {audit.candidates} of its class{outside}, but "
        f"{bundle.name} has {number_of(most, 'test image')} of class "
        f"{int(mine.flatten()[counts.argmin()])}{outside}; give "
        + (f"--candidates {most} or fewer." if most > 1 else "updates of fewer images.")
    )


def in_order(guesses: Tensor, images: Tensor, size: int) -> Tensor:
    """Indices (N,) that put the guesses (N, C, H, W) of every ``size`` images in the best order."""
    parts = []
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        parts.append(start + metrics.best_matching(guesses[part], images[part]))
    return torch.cat(parts)


def measured(x: Tensor, truth: Truth, size: int) -> dict[str, Tensor]:
    """As :func:`figures_of`, of images that were put in the best order within every ``size``."""
    figures = figures_of(x, truth.images, truth.pool, truth.decoys)
    if size > 1:
        figures["identified"] = identified_in_batches(x, truth, size).double()
    return figures


def subset(truth: Truth, index: Tensor) -> Truth:
    """The images at the flat positions ``index`` (M,)."""
    figures = {name: values[index] for name, values in truth.floor_figures.items()}
    return replace(
        truth,
        rows=truth.rows[index],
        images=truth.images[index],
        labels=truth.labels[index],
        floor=truth.floor[index],
        decoys=truth.decoys[index],
        floor_figures=figures,
    )


def fished(truth: Truth, shape: tuple[int, int, int], target: int) -> tuple[Tensor, Tensor]:
    """What a server that fishes for one class can get.

    Args:
        truth: Everybody's images.
        shape: (victims, T, images per update).
        target: The class.

    Returns:
        Victims with exactly one image of the class in every update, int64 (V,), and the flat
        positions of those images, (V * T,).
    """
    mine = (truth.labels == target).view(shape)
    victims = (mine.sum(dim=2) == 1).all(dim=1).nonzero().flatten()
    places = mine.flatten().nonzero().flatten()
    return victims, places[torch.isin(places // (shape[1] * shape[2]), victims)]


def figures_of(x: Tensor, truth: Tensor, pool: Tensor, decoys: Tensor) -> dict[str, Tensor]:
    """Every metric of reconstructions ``x`` (N, C, H, W) by name, each (N,) float64.

    PSNR ends at :data:`PSNR_CEILING`, the paper's at :data:`PAPER_PSNR_CEILING`.
    """
    ssim = metrics.ssim(x, truth)
    figures = {
        "mse": metrics.mse(x, truth),
        "psnr": metrics.psnr(x, truth).clamp(max=PSNR_CEILING),
        "ssim": ssim,
        "ssim_aligned": metrics.ssim_aligned(x, truth),
        "identified": metrics.identified(x, truth, pool, decoys).double(),
        "success": metrics.success(ssim).double(),
        "paper_mse": metrics.paper_mse(x, truth),
        "paper_psnr": metrics.paper_psnr(x, truth).clamp(max=PAPER_PSNR_CEILING),
    }
    if min(truth.shape[-2:]) >= 7:
        figures["ssim_uniform"] = metrics.ssim_uniform(x, truth)
    figures |= _perceptual(x, truth)
    return figures


def _perceptual(x: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """LPIPS where its weights are and the images are large enough for its network.

    Raises:
        DataError: The weights are there and cannot be read: the column must not vanish unsaid.
    """
    if min(truth.shape[-2:]) < metrics.LPIPS_BACKBONES[LPIPS][1]:
        return {}
    value = metrics.lpips(x, truth, LPIPS)
    return {"lpips": value} if isinstance(value, Tensor) else {}


def matched(found: Sequence[Reconstruction], truth: Truth) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and labels (N,), each update's put in the order that fits best.

    A gradient does not tell the order within a batch; the floor's guesses are matched alike.
    """
    images = torch.cat([one.images.flatten(0, 1) for one in found]).to(truth.images.dtype)
    labels = torch.cat([one.labels.flatten() for one in found])
    if (per_update := found[0].images.shape[1]) > 1:
        order = in_order(images, truth.images, per_update)
        images, labels = images[order], labels[order]
    return images, labels


def identified_in_batches(images: Tensor, truth: Truth, size: int) -> Tensor:
    """For which of N images the truth is nearer than all decoys to what came out of its batch.

    The order within a batch was chosen by the truth, which a decoy has not helped to choose: by
    that order alone a guesser is right far more often than 1 time in K. Here every candidate is as
    near as the nearest of the batch's ``size`` reconstructions, so that they are all alike to a
    guesser.

    Returns:
        bool (N,).
    """
    hits = []
    for i, decoys in enumerate(truth.decoys):
        start = i - i % size
        mine = images[start : start + size].double().flatten(1)
        candidates = torch.cat([truth.images[i][None], truth.pool[decoys]]).double().flatten(1)
        near = torch.cdist(candidates, mine).amin(dim=1)
        hits.append((near[0] * (1 + 1e-9) < near[1:]).all())
    return torch.stack(hits)


def picked(found: Sequence[Reconstruction], truth: Truth) -> Tensor:
    """For which of N images the attack's own score of the truth is above that of all decoys.

    It is given the candidates in an order that tells nothing, and their class: one that the update
    holds. Of an update of several images, decoys are no image of it.

    Returns:
        float64 (N,): 1, 0, or NaN for all images of a victim of whose scores one is no number.

    Raises:
        AttackError: A victim without a score, updates of several images that an attack cannot be
            asked about, or no victim whose scores are numbers.
    """
    if any(
        one.together is None and (one.score is None or one.images.shape[1] != 1) for one in found
    ):
        raise AttackError("scores of candidates are for all victims, of one image each, or none.")
    orders = [
        torch.randperm(len(decoys) + 1, generator=derive(i, "order of candidates"))
        for i, decoys in enumerate(truth.decoys)
    ]
    hits = []
    for i, scores in enumerate(_scores(found, truth, orders)):
        own = orders[i] == 0
        hit = (scores[own].squeeze() > scores[~own].max()).double()
        hits.append(hit if bool(scores.isfinite().all()) else torch.full_like(hit, torch.nan))
    victims = torch.stack(hits).view(len(found), -1)
    lost = victims.isnan().any(dim=1, keepdim=True)
    if bool(lost.all()):
        raise AttackError("all victims have scores that are no numbers.")
    return victims.masked_fill(lost, torch.nan).flatten()


def _scores(
    found: Sequence[Reconstruction], truth: Truth, orders: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Of the candidates of each image, in the orders given."""

    def candidates(i: int) -> Tensor:
        return torch.cat([truth.images[i][None], truth.pool[truth.decoys[i]]])[orders[i]]

    together = found[0].together
    if together is not None:
        yield from together([candidates(i) for i in range(len(orders))], truth.labels)
        return
    for i in range(len(orders)):
        victim, update = divmod(i, len(truth.rows) // len(found))
        score = found[victim].score
        assert score is not None
        yield score(update, candidates(i))


def rows_of(
    found: Sequence[Reconstruction],
    images: Tensor,
    labels: Tensor,
    truth: Truth,
    facts: dict[str, Any],
    *,
    victims: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """One plain dict per image; of a victim with scores that are no numbers as of who is left out.

    Args:
        found: A reconstruction per victim.
        images, labels: What :func:`matched` made of them.
        truth: Of the same victims.
        facts: In every row (attack, defense, ...). Where ``labels_granted``, none was found.
        victims: Their numbers; 0, 1, ... if None.
    """
    figures = measured(images, truth, found[0].images.shape[1])
    per_victim = len(images) // len(found)
    if found[0].score is not None or found[0].together is not None:
        figures["identified"] = picked(found, truth)
    numbers = range(len(found)) if victims is None else victims
    rows = []
    for i in range(len(images)):
        place = i // per_victim
        if bool(figures["identified"][i].isnan()):
            rows.append(_guessed(i, truth, facts, numbers[place], _NO_NUMBERS))
            continue
        label = None if facts.get("labels_granted") else int(labels[i])
        own = {"victim": numbers[place], "label_found": label, "left_out": None}
        rows.append(_row(i, truth, figures, {**facts, **own, "loss": number(found[place].loss)}))
    return rows


def guessed_rows(
    truth: Truth, facts: dict[str, Any], failed: Mapping[int, str]
) -> list[dict[str, Any]]:
    """Rows of victims that an attack cannot treat: its attacker is left with the floor's guess.

    They say why in ``left_out``; advantage and found label are none.

    Args:
        truth: Of these victims, in ascending order.
        facts: In every row.
        failed: Victim and reason.
    """
    per_victim = len(truth.rows) // len(failed)
    rows = []
    for i in range(len(truth.rows)):
        victim = sorted(failed)[i // per_victim]
        rows.append(_guessed(i, truth, facts, victim, failed[victim]))
    return rows


def _guessed(
    i: int, truth: Truth, facts: dict[str, Any], victim: int, reason: str
) -> dict[str, Any]:
    own = {"victim": victim, "label_found": None, "left_out": reason, "loss": None}
    return _row(i, truth, truth.floor_figures, {**facts, **own})


def _row(
    i: int, truth: Truth, figures: Mapping[str, Tensor], facts: dict[str, Any]
) -> dict[str, Any]:
    floor = ("mse", "ssim", "ssim_aligned", "identified", "success")
    row = {
        **facts,
        "image": int(truth.rows[i]),
        "label": int(truth.labels[i]),
        **{name: number(float(values[i])) for name, values in figures.items()},
        **{f"floor_{name}": number(float(truth.floor_figures[name][i])) for name in floor},
    }
    row.setdefault("lpips", None)
    row.setdefault("ssim_uniform", None)
    row["advantage"] = row["ssim_aligned"] - row["floor_ssim_aligned"]
    for name in ("identified", "success", "floor_identified", "floor_success"):
        row[name] = bool(row[name])
    return row


def number(value: float) -> float | None:
    """``value`` for JSON: infinity and nan become None."""
    return value if abs(value) < float("inf") else None
