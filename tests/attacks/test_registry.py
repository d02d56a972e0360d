"""The attacks by name."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from attackhelp import CLASSES, images, observe, tiny
from torch import nn

from fedkl.attacks import (
    ATTACKS,
    DLG,
    EFFORTS,
    NEED_PUBLIC,
    SEARCHING,
    Attack,
    ClosedForm,
    ConditionalGenerator,
    GradientMatching,
    check_installed,
    make_attack,
)
from fedkl.errors import AttackError, ConfigError


def made(name: str, effort: str = "quick", **budget: int) -> Attack:
    generator = ConditionalGenerator(latent=2, width=4, image_shape=(1, 8, 8), num_classes=4)
    public = (torch.rand(20, 1, 8, 8), torch.arange(20) % 4)
    return make_attack(name, effort, generator_model=generator, public=public, **budget)


def test_who_needs_public_images_is_who_fails_without_them() -> None:
    for name in ATTACKS:
        try:
            make_attack(name)
        except AttackError:
            assert name in NEED_PUBLIC
        else:
            assert name not in NEED_PUBLIC


@pytest.mark.parametrize("name", ATTACKS)
def test_iterations_and_parallel_are_for_those_who_search(name: str) -> None:
    attack = made(name, iterations=7, parallel=2)
    assert isinstance(attack, GradientMatching) == (name in SEARCHING)
    if isinstance(attack, GradientMatching):
        assert (attack.iterations, attack.parallel) == (7, 2)
        assert "iterations=7" in repr(attack)
        assert "parallel=2" in repr(attack)
        usual = made(name)
        assert isinstance(usual, GradientMatching)
        assert usual.iterations >= 150
        with pytest.raises(ConfigError, match="iterations 0"):
            made(name, iterations=0)


@pytest.mark.parametrize("kind", sorted({type(made(name)) for name in ATTACKS}, key=str))
def test_a_setting_that_an_attack_does_not_have_is_refused(kind: type[Attack]) -> None:
    with pytest.raises(ConfigError, match="'iteratons'") as caught:
        kind(iteratons=5)
    expected = {ClosedForm: "has none; leave it out", DLG: "Did you mean 'iterations'"}
    assert expected.get(kind, "Choose one of: ") in str(caught.value)


MODELS = {
    "convolution": lambda: tiny(),
    "norm": lambda: tiny(norm=True),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)),
    "no bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES, bias=False)),
    "convolutional head": lambda: nn.Sequential(
        nn.Conv2d(1, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
}


@pytest.mark.parametrize("count", [2, 24])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_answers_for_every_victim_or_says_why_not(
    name: str, model: str, count: int
) -> None:
    """Anything but an AttackError ends an audit of all attacks."""
    x, y = images(count, (1, 8, 8)), torch.arange(count) % CLASSES
    budget = {"iterations": 1} if name in SEARCHING else {}
    seen, found = observe(MODELS[model](), x, y), []
    with contextlib.suppress(AttackError):
        found = made(name, **budget).reconstruct(seen, generator=torch.Generator().manual_seed(0))
    assert [one.images.shape for one in found] in ([], [(1, 1, 1, 8, 8)] * count)


def test_ggl_as_published_is_the_papers_effort() -> None:
    for effort in ("quick", "standard"):
        assert made("ggl", effort).settings["search"] == "gradient"
    settings = made("ggl", "paper").settings
    assert (settings["search"], settings["distance"]) == ("cma-es", "squared")


@pytest.mark.parametrize("effort", EFFORTS)
def test_who_needs_cma_is_told_before_it_searches(
    effort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_installed(ATTACKS, effort)
    monkeypatch.setitem(sys.modules, "cma", None)
    for name in ATTACKS:
        if made(name, effort).settings.get("search") == "cma-es":
            with pytest.raises(ConfigError, match=r"'ggl' at effort 'paper'.*fedkl\[audit\]"):
                check_installed([name], effort)
        else:
            check_installed([name], effort)
