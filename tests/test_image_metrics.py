"""Image metrics against numpy, scipy, scikit-image and loops, and what must hold for any image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from fedkl import metrics
from fedkl.errors import DataError
from fedkl.rng import derive

SEEDS = st.integers(0, 10**6)
Metric = Callable[[Tensor, Tensor], Tensor]
FEW = settings(max_examples=15)


def pictures(seed: int, *shape: int) -> Tensor:
    """Smooth images in [0, 1], float32: noise alone has hardly any structure to compare."""
    noise = torch.rand(shape, generator=derive(seed, "pictures"), dtype=torch.float64).numpy()
    smooth = scipy.ndimage.gaussian_filter(noise, sigma=(0, 0, 1.5, 1.5))
    low, high = smooth.min((2, 3), keepdims=True), smooth.max((2, 3), keepdims=True)
    return torch.from_numpy((smooth - low) / (high - low)).float()


def noisy(images: Tensor, amount: float, seed: int = 1) -> Tensor:
    noise = torch.randn(images.shape, generator=derive(seed, "noise"))
    return (images + amount * noise).clamp(0, 1)


def gaussian_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004 on one channel, mirrored at the border, by scipy."""

    def blur(image: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(image, sigma=1.5, truncate=3.5, mode="mirror")

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    index = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
    return float(np.mean(index / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))))


X = noisy(pictures(0, 3, 2, 13, 16), 0.1)
T = pictures(0, 3, 2, 13, 16)
PAIRS = [(x.double().numpy(), t.double().numpy()) for x, t in zip(X, T, strict=True)]

REFERENCES: list[tuple[Metric, Callable[[np.ndarray, np.ndarray], float]]] = [
    (metrics.mse, lambda x, t: float(np.mean((x - t) ** 2))),
    (metrics.psnr, lambda x, t: peak_signal_noise_ratio(t, x, data_range=1)),
    (
        metrics.ssim,
        lambda x, t: float(np.mean([gaussian_ssim(*c) for c in zip(x, t, strict=True)])),
    ),
    (
        metrics.ssim_uniform,
        lambda x, t: structural_similarity(x, t, channel_axis=0, data_range=1, win_size=7),
    ),
    (metrics.paper_mse, lambda x, t: float(np.sqrt(np.mean((255 * x - 255 * t) ** 2)))),
    (
        metrics.paper_psnr,
        lambda x, t: 10 * math.log10(255**2 / np.sqrt(np.mean((255 * x - 255 * t) ** 2))),
    ),
]


@pytest.mark.parametrize("ours, reference", REFERENCES, ids=[m.__name__ for m, _ in REFERENCES])
def test_agrees_with_an_independent_implementation(
    ours: Metric, reference: Callable[[np.ndarray, np.ndarray], float]
) -> None:
    got = ours(X, T)
    assert got.shape == (3,)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([reference(x, t) for x, t in PAIRS], rel=1e-9)


@pytest.mark.parametrize("ours", [m for m, _ in REFERENCES], ids=lambda f: f.__name__)
def test_an_image_is_measured_alone(ours: Metric) -> None:
    together = ours(X, T)
    alone = torch.cat([ours(X[i : i + 1], T[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, rtol=1e-12, atol=0)


def test_paper_convention_gives_the_paper_s_own_pair() -> None:
    # Leakage table, DLG on MNIST with the lock: "MSE" 140.87, "PSNR" 26.64.
    x = torch.full((1, 1, 8, 8), 140.87 / 255, dtype=torch.float64)
    zero = torch.zeros_like(x)
    assert metrics.paper_mse(x, zero).item() == pytest.approx(140.87)
    assert metrics.paper_psnr(x, zero).item() == pytest.approx(26.64, abs=0.005)
    # A true 28.1 dB reads 38.1.
    y = torch.full_like(x, 10 ** (-28.1 / 20))
    assert metrics.psnr(y, zero).item() == pytest.approx(28.1)
    assert metrics.paper_psnr(y, zero).item() == pytest.approx(38.1, abs=0.05)


def test_the_two_windows_are_not_the_same_metric() -> None:
    blank = T.mean(dim=(2, 3), keepdim=True).expand_as(T)
    assert not torch.allclose(metrics.ssim(blank, T), metrics.ssim_uniform(blank, T), atol=1e-3)


@FEW
@given(SEEDS)
def test_equal_images(seed: int) -> None:
    x = pictures(seed, 2, 1, 8, 9)
    assert metrics.mse(x, x).tolist() == [0, 0]
    assert metrics.psnr(x, x).tolist() == [math.inf] * 2
    assert metrics.paper_psnr(x, x).tolist() == [math.inf] * 2
    for similar in (metrics.ssim, metrics.ssim_uniform, metrics.ssim_aligned):
        assert similar(x, x).tolist() == pytest.approx([1, 1], abs=1e-9)


@FEW
@given(SEEDS, st.floats(0.05, 0.9))
def test_nearer_images_have_more_psnr(seed: int, share: float) -> None:
    x, t = pictures(seed, 2, 1, 8, 8), pictures(seed + 1, 2, 1, 8, 8)
    nearer = t + share * (x - t)
    assert bool((metrics.psnr(nearer, t) > metrics.psnr(x, t)).all())
    assert bool((metrics.paper_psnr(nearer, t) > metrics.paper_psnr(x, t)).all())


@FEW
@given(SEEDS)
def test_similarity_is_symmetric_and_bounded(seed: int) -> None:
    x, t = pictures(seed, 2, 1, 9, 8), pictures(seed + 1, 2, 1, 9, 8)
    for similar in (metrics.ssim, metrics.ssim_uniform):
        assert torch.allclose(similar(x, t), similar(t, x), atol=1e-12)
        assert bool((similar(x, t).abs() <= 1).all())
        assert bool((similar(x, t) < 0.99).all())


def test_alignment_is_a_least_squares_fit() -> None:
    aligned = metrics.align_affine(X.double(), T)
    for image, channel in itertools.product(range(3), range(2)):
        x, t = X[image, channel].double().numpy().ravel(), T[image, channel].double().numpy()
        slope, offset = np.polyfit(x, t.ravel(), 1)
        assert slope > 0
        expected = (slope * x + offset).reshape(t.shape)
        assert np.allclose(aligned[image, channel].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 7e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_or_inverted_image_becomes_the_mean(value: float, dtype: torch.dtype) -> None:
    mean = T.double().mean(dim=(2, 3), keepdim=True).expand_as(T)
    for x in (torch.full_like(T, value, dtype=dtype), (value - 0.5 * T).to(dtype)):
        aligned = metrics.align_affine(x, T)
        assert aligned.dtype == dtype
        assert torch.allclose(aligned.double(), mean, atol=1e-6)


@FEW
@given(SEEDS, st.floats(-3, 3), st.floats(-5, 5))
def test_alignment_forgets_brightness_and_contrast(seed: int, log_a: float, b: float) -> None:
    x, t = noisy(pictures(seed, 2, 2, 8, 8), 0.2).double(), pictures(seed, 2, 2, 8, 8)
    a = 10**log_a
    changed = torch.stack([a * x[:, 0] + b, x[:, 1] / a - b], dim=1)
    assert torch.allclose(metrics.align_affine(changed, t), metrics.align_affine(x, t), atol=1e-7)
    assert torch.allclose(metrics.ssim_aligned(changed, t), metrics.ssim_aligned(x, t), atol=1e-6)
    assert metrics.ssim_aligned(a * t.double() + b, t).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_alignment_of_a_faint_image() -> None:
    faint = 1e-200 * T.double()
    assert metrics.ssim_aligned(faint, T).tolist() == pytest.approx([1, 1, 1])


def test_success_counts_the_threshold_itself() -> None:
    values = torch.tensor([0.59, 0.6, -1.0, 1.0], dtype=torch.float64)
    assert metrics.success(values).tolist() == [False, True, False, True]
    assert metrics.success(values, 0.595).tolist() == [False, True, False, True]
    assert metrics.success(values, -1).tolist() == [True] * 4


def test_identification_agrees_with_a_loop(generator: torch.Generator) -> None:
    truths, pool = pictures(1, 12, 1, 6, 6), pictures(2, 40, 1, 6, 6)
    share = torch.linspace(0, 1, 12)[:, None, None, None]
    guesses = share * truths + (1 - share) * pictures(3, 12, 1, 6, 6)
    decoys = torch.stack([torch.randperm(40, generator=generator)[:30] for _ in range(12)])
    expected = []
    for guess, truth, row in zip(guesses, truths, decoys, strict=True):
        others = [np.linalg.norm(guess.numpy() - pool[int(i)].numpy()) for i in row]
        expected.append(bool(np.linalg.norm(guess.numpy() - truth.numpy()) < min(others)))
    assert metrics.identified(guesses, truths, pool, decoys).tolist() == expected
    assert any(expected)
    assert not all(expected)


def test_a_double_of_the_truth_is_a_tie_at_any_distance() -> None:
    truths = pictures(3, 2, 1, 4, 4)
    guesses = (truths + 0.05).clamp(0, 1)
    decoys = torch.tensor([[0], [1]])
    assert metrics.identified(guesses, truths, truths.clone(), decoys).tolist() == [False, False]


def test_a_tie_is_not_identified() -> None:
    truths = pictures(3, 2, 3, 8, 8)
    far = 1 - truths
    decoys = torch.tensor([[0, 1], [2, 3]])
    # The truth itself among the decoys of the first image; the guess half-way in the second.
    pool = torch.cat([truths[:1], far[:1], far[1:], far[1:]])
    guesses = torch.stack([truths[0], torch.full_like(truths[1], 0.5)])
    assert metrics.identified(guesses, truths, pool, decoys).tolist() == [False, False]
    assert metrics.identified(truths, truths, far, torch.tensor([[0], [1]])).tolist() == [True] * 2


def test_guessing_identifies_one_in_k(generator: torch.Generator) -> None:
    truths, pool = pictures(4, 300, 1, 4, 4), pictures(5, 300, 1, 4, 4)
    decoys = torch.stack([torch.randperm(300, generator=generator)[:3] for _ in range(300)])
    hits = metrics.identified(pictures(6, 300, 1, 4, 4), truths, pool, decoys)
    low, high = metrics.proportion_interval(int(hits.sum()), 300)
    assert low < 1 / 4 < high


def test_decoys_are_others_of_the_same_class() -> None:
    pool_labels = torch.arange(60) % 3
    labels, own = torch.tensor([0, 2, 1, 0]), torch.tensor([0, 5, -1, 57])

    def draw() -> Tensor:
        generator = derive(0, "decoys")
        return metrics.draw_decoys(labels, pool_labels, generator=generator, own=own, count=19)

    decoys = draw()
    assert torch.equal(decoys, draw())
    for row, label, mine in zip(decoys.tolist(), labels.tolist(), own.tolist(), strict=True):
        assert len(set(row)) == 19
        assert mine not in row
        assert all(i % 3 == label for i in row)
    with pytest.raises(DataError, match="got 19 other images of class 0, expected 20"):
        metrics.draw_decoys(labels, pool_labels, generator=derive(0), own=own, count=20)


def test_floor_is_the_mean_of_the_class() -> None:
    images, classes = pictures(7, 10, 2, 6, 6), [4, 0, 4, 9, 0, 4, 9, 9, 9, 0]
    floor = metrics.class_mean_floor(images, torch.tensor(classes), torch.tensor([9, 4, 9]))
    assert floor.dtype == torch.float32
    for row, label in zip(floor, [9, 4, 9], strict=True):
        mine = [images[i].double().numpy() for i, c in enumerate(classes) if c == label]
        assert np.allclose(row.numpy(), sum(mine) / len(mine), atol=1e-6)


def test_advantage_pairs_the_images() -> None:
    attack, floor = torch.tensor([0.9, 0.5, 0.7]), torch.tensor([0.8, 0.3, 0.7])
    mean, half = metrics.advantage(attack, floor)
    low, high = scipy.stats.ttest_rel(attack, floor).confidence_interval(0.95)
    assert half is not None
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-6)
    hits = torch.tensor([True, False, True])
    assert metrics.advantage(hits, ~hits)[0] == pytest.approx(1 / 3)
    assert metrics.advantage(attack[:1], floor[:1])[1] is None


@FEW
@given(SEEDS)
def test_matching_recovers_a_permutation(seed: int) -> None:
    truths = pictures(seed, 6, 1, 6, 6)
    order = torch.randperm(6, generator=derive(seed, "order"))
    guesses = noisy(truths, 0.02)[order]
    matched = metrics.best_matching(guesses, truths)
    assert torch.equal(order[matched], torch.arange(6))


def test_matching_is_the_best_of_all_permutations() -> None:
    guesses, truths = pictures(8, 5, 1, 6, 6), pictures(9, 5, 1, 6, 6)
    best = min(
        (float(((guesses[list(p)] - truths) ** 2).sum()), p)
        for p in itertools.permutations(range(5))
    )
    assert tuple(metrics.best_matching(guesses, truths).tolist()) == best[1]


@given(st.integers(1, 400), st.data())
def test_proportion_interval_is_clopper_pearson(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low, high = metrics.proportion_interval(k, n)
    exact = scipy.stats.binomtest(k, n).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=1e-9)
    # What it means: at the bounds, what was seen or worse has a probability of 2.5 %.
    if k > 0:
        assert scipy.stats.binom.sf(k - 1, n, low) == pytest.approx(0.025, rel=1e-6)
    if k < n:
        assert scipy.stats.binom.cdf(k, n, high) == pytest.approx(0.025, rel=1e-6)


def test_no_success_out_of_many_is_not_zero() -> None:
    assert metrics.proportion_interval(0, 100) == (0.0, pytest.approx(1 - 0.025 ** (1 / 100)))


OF_PAIRS: list[Metric] = [
    *(metric for metric, _ in REFERENCES),
    metrics.ssim_aligned,
    metrics.align_affine,
    metrics.best_matching,
    metrics.lpips,  # type: ignore[list-item]
]
GOOD = torch.full((2, 1, 32, 32), 0.5)
BAD = [
    (GOOD[0], "expected a float tensor"),
    (GOOD[:0], "not empty"),
    ((GOOD * 255).to(torch.uint8), "divide 8-bit images by 255"),
    (GOOD[:1], "same shape"),
    (GOOD[..., :16], "same shape"),
    (GOOD * math.nan, "not finite"),
    (GOOD / 0, "not finite"),
]


@pytest.mark.parametrize("metric", OF_PAIRS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("bad, message", BAD)
def test_bad_images_are_refused(metric: Metric, bad: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metric(bad, GOOD)
    with pytest.raises(DataError, match=message):
        metric(GOOD, bad)


@pytest.mark.parametrize("metric", OF_PAIRS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("factor", [255.0, -0.1])
def test_images_out_of_range_are_refused(metric: Metric, factor: float) -> None:
    with pytest.raises(DataError, match=r"expected \[0, 1\]"):
        metric(GOOD, GOOD * factor)
    if metric not in (metrics.align_affine, metrics.ssim_aligned):
        with pytest.raises(DataError, match=r"expected \[0, 1\]"):
            metric(GOOD * factor, GOOD)


LABELS = torch.tensor([1, 1])
REFUSALS: list[tuple[str, Callable[[], object]]] = [
    ("6x6 pixels or more", lambda: metrics.ssim(GOOD[..., :5], GOOD[..., :5])),
    ("7x7 pixels or more", lambda: metrics.ssim_uniform(GOOD[..., :6, :], GOOD[..., :6, :])),
    ("31x31 pixels or more", lambda: metrics.lpips(GOOD[..., :30], GOOD[..., :30])),
    ("1 or 3", lambda: metrics.lpips(GOOD.repeat(1, 2, 1, 1), GOOD.repeat(1, 2, 1, 1))),
    ("Did you mean 'alex'", lambda: metrics.lpips(GOOD, GOOD, "alexnet")),
    (r"within \[-1, 1\]", lambda: metrics.success(torch.tensor([math.nan]))),
    (r"within \[-1, 1\]", lambda: metrics.success(torch.tensor([60.0]))),
    (r"expected \(N,\)", lambda: metrics.success(torch.tensor(0.5))),
    ("as ndarray; expected a torch.Tensor", lambda: metrics.ssim(GOOD.numpy(), GOOD)),  # type: ignore[arg-type]
    ("targets as list", lambda: metrics.mse(GOOD, GOOD.tolist())),  # type: ignore[arg-type]
    ("SSIM values as list", lambda: metrics.success([0.5])),  # type: ignore[arg-type]
    ("a floor as list", lambda: metrics.advantage(torch.zeros(2), [0.0, 0.0])),  # type: ignore[arg-type]
    ("labels as list", lambda: metrics.class_mean_floor(GOOD, LABELS, [1])),  # type: ignore[arg-type]
    ("decoys as list", lambda: metrics.identified(GOOD, GOOD, GOOD, [[1], [0]])),  # type: ignore[arg-type]
    ("threshold", lambda: metrics.success(torch.tensor([0.5]), 60)),
    ("label 3", lambda: metrics.class_mean_floor(GOOD, LABELS, torch.tensor([1, 3]))),
    (r"\(2,\)", lambda: metrics.class_mean_floor(GOOD, LABELS[:1], LABELS)),
    ("integers", lambda: metrics.class_mean_floor(GOOD, LABELS, LABELS.float())),
    ("count 0", lambda: metrics.draw_decoys(LABELS, LABELS, generator=derive(0), count=0)),
    ("same channels", lambda: metrics.identified(GOOD, GOOD, GOOD[..., :9], LABELS[:, None])),
    ("K - 1", lambda: metrics.identified(GOOD, GOOD, GOOD, LABELS)),
    ("K - 1", lambda: metrics.identified(GOOD, GOOD, GOOD, LABELS[:, None][:, :0])),
    ("indices", lambda: metrics.identified(GOOD, GOOD, GOOD, LABELS[:, None] + 1)),
    ("indices", lambda: metrics.identified(GOOD, GOOD, GOOD, LABELS[:, None] - 2)),
    ("one value per image", lambda: metrics.advantage(torch.zeros(2), torch.zeros(3))),
    ("finite", lambda: metrics.advantage(torch.tensor([math.inf]), torch.zeros(1))),
    ("3 successes out of 2", lambda: metrics.proportion_interval(3, 2)),
    ("0 successes out of 0", lambda: metrics.proportion_interval(0, 0)),
]


@pytest.mark.parametrize("message, call", REFUSALS)
def test_bad_input_is_refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(DataError, match=message):
        call()
