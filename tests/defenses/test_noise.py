"""Clip and noise: how far updates are shortened, how much is added, and to what."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedkl.defenses import Composed, DefenseConfig, Noise, Prune, Sending, make_defense
from fedkl.errors import ConfigError
from fedkl.rng import derive


def sending(received: Any = None, seed: int = 0) -> Sending:
    return Sending(received, ["w", "b"], derive(seed, "noise"))


def norm(tensors: dict[str, Tensor], names: str = "wb") -> float:
    return math.sqrt(sum(float(tensors[n].double().square().sum()) for n in names))


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.booleans())
def test_without_noise_the_change_is_shortened_to_the_clip_and_never_lengthened(
    size: float, clip: float, weights: bool
) -> None:
    change = {"w": torch.tensor([0.6, 0.0]) * size, "b": torch.tensor([[0.8]]) * size}
    start = {"w": torch.tensor([3.0, -1.0]), "b": torch.tensor([[2.0]])} if weights else None
    change = {n: t.double() for n, t in change.items()}
    update = {n: t + start[n] if start else t for n, t in change.items()}
    found = Noise(clip=clip, noise_multiplier=0).share(update, sending(start))
    moved = {n: t - start[n] if start else t for n, t in found.items()}
    factor = min(1.0, clip / norm(change))
    for name, value in moved.items():
        torch.testing.assert_close(value, change[name] * factor, rtol=1e-6, atol=1e-12)


def test_what_is_within_the_clip_stays_to_the_bit() -> None:
    update = {"w": torch.tensor([0.1, 0.7]), "b": torch.tensor([1e-20])}
    start = {n: torch.full_like(t, 0.3) for n, t in update.items()}
    found = Noise(clip=5.0, noise_multiplier=0).share(update, sending(start))
    assert all(torch.equal(found[n], update[n]) for n in update)


@pytest.mark.parametrize("weights", [False, True], ids=["gradient", "weights"])
def test_noise_has_mean_zero_and_the_deviation_asked_for(weights: bool) -> None:
    size = 200_000
    update = {"w": torch.zeros(size), "b": torch.zeros(5)}
    start = {n: torch.ones_like(t) for n, t in update.items()} if weights else None
    if start is not None:
        update = {n: t.clone() for n, t in start.items()}
    found = Noise(clip=2.0, noise_multiplier=0.05).share(update, sending(start))
    drawn = (found["w"] - update["w"]).double()
    assert float(drawn.mean()) == pytest.approx(0, abs=5 * 0.1 / math.sqrt(size))
    assert float(drawn.std()) == pytest.approx(0.1, rel=0.01)
    assert float((drawn.abs() < 0.1).double().mean()) == pytest.approx(0.6827, abs=0.006)
    assert bool(found["b"].sub(update["b"]).any())


def test_the_clip_comes_before_the_noise() -> None:
    """The noise does not grow with what was clipped."""
    small, large = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1e6, 0.0])}
    value = Noise(clip=1.0, noise_multiplier=0.1)
    found = [value.share(update, sending())["w"] for update in (small, large)]
    torch.testing.assert_close(found[0], found[1])


def test_buffers_go_as_they_are_and_counters_stay_integers() -> None:
    update = {"w": torch.ones(3), "mean": torch.ones(3), "seen": torch.tensor(3)}
    found = Noise(clip=1.0, noise_multiplier=1.0).share(update, sending())
    assert not torch.equal(found["w"], update["w"])
    assert torch.equal(found["mean"], update["mean"])
    assert torch.equal(found["seen"], update["seen"])
    assert torch.equal(update["w"], torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    assert Noise().share({"w": torch.ones(3, dtype=dtype)}, sending())["w"].dtype == dtype


def test_the_same_generator_gives_the_same_noise_and_another_one_other() -> None:
    update = {"w": torch.zeros(20), "b": torch.zeros(2)}
    one, two, other = (Noise().share(update, sending(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one[n], two[n]) for n in update)
    assert not any(torch.equal(one[n], other[n]) for n in update)


def test_what_has_diverged_stays_so() -> None:
    for bad in (math.nan, math.inf):
        found = Noise().share({"w": torch.tensor([1.0, bad])}, sending())["w"]
        assert not bool(torch.isfinite(found).all())


def test_a_composition_does_what_it_says_in_that_order() -> None:
    update = {"w": torch.tensor([3.0, 4.0])}
    first = make_defense(
        DefenseConfig(name="prune+noise", clip=2.0, noise_multiplier=0.0, prune_ratio=0.5)
    )
    then = make_defense(
        DefenseConfig(name="noise+prune", clip=2.0, noise_multiplier=0.0, prune_ratio=0.5)
    )
    assert first.share(update, sending())["w"].tolist() == [0.0, 2.0]
    torch.testing.assert_close(then.share(update, sending())["w"], torch.tensor([0.0, 1.6]))
    assert first.known == {"prune_ratio": 0.5, "clip": 2.0, "noise": 0.0}
    assert then.known == {**first.known, "clip_first": True}
    # Noise that comes last is on every entry, noise that comes first on those that stay.
    noised = {"clip": 2.0, "noise_multiplier": 0.1}
    last = Composed([Prune(prune_ratio=0.5), Noise(**noised)]).share(update, sending())
    early = Composed([Noise(**noised), Prune(prune_ratio=0.5)]).share(update, sending())
    assert int((last["w"] == 0).sum()) == 0
    assert int((early["w"] == 0).sum()) == 1


def test_by_name_with_its_settings() -> None:
    value = make_defense(DefenseConfig(name="norm+noise", clip=2.0, noise_multiplier=0.5))
    assert (value.name, value.keyed) == ("norm+noise", False)
    assert value.known == {"clip": 2.0, "noise": 1.0}
    assert repr(make_defense(DefenseConfig(name="noise"))) == (
        "Noise(clip=2.5, noise_multiplier=0.001)"
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"clip": 0.0}, r"clip must be a positive number, got 0\.0"),
        ({"clip": -1.0}, r"clip must be a positive number, got -1\.0"),
        ({"clip": math.nan}, r"clip must be a positive number, got nan"),
        ({"noise_multiplier": -0.1}, r"noise_multiplier must be a number of at least 0, got -0\.1"),
        ({"noise_multiplier": math.nan}, r"noise_multiplier .* got nan.* Give 0 to clip alone"),
        ({"noise_multiplier": math.inf}, r"noise_multiplier .* got inf"),
        ({"noise_multiplier": 1e30, "clip": 1e10}, r"noise_multiplier \* clip .* at most 1e\+30"),
    ],
)
@pytest.mark.parametrize("name", ["noise", "pad+noise", "none"])
def test_a_bad_value_is_refused_at_once(
    name: str, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DefenseConfig(name=name, **settings)


@pytest.mark.parametrize("name", ["noise+noise", "prune+norm+prune"])
def test_twice_the_same_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"more than once, and settings for one; keep one"):
        DefenseConfig(name=name)
