"""Inverting Gradients by L-BFGS."""

from __future__ import annotations

import pytest
import torch
from attackhelp import images, lenet, observe, tiny
from torch import Tensor

from fedkl import metrics
from fedkl.attacks import DLG, InvertingGradients
from fedkl.attacks.record import in_range
from fedkl.attacks.search import Trials
from fedkl.errors import ConfigError
from fedkl.rng import derive


def test_lbfgs_gets_further_than_adam_on_the_same_loss_and_iterations() -> None:
    x = images(2, (1, 16, 16))
    observations = observe(lenet(1, 16), x, torch.tensor([3, 7]), classes=10)

    def likeness(attack: InvertingGradients) -> tuple[float, float]:
        found = attack.reconstruct(observations, generator=derive(0, "attack"))
        shown = torch.cat([one.images[0] for one in found])
        return float(metrics.ssim(shown, x).min()), max(one.loss for one in found)

    newton = InvertingGradients(iterations=300, lr=1.0, tv=0.0, signed=False, optimizer="l-bfgs")
    adam = InvertingGradients(iterations=300, tv=0.0, signed=False)
    (ssim, loss), (ssim_adam, loss_adam) = likeness(newton), likeness(adam)
    assert ssim > 0.9
    assert ssim > ssim_adam
    assert loss < loss_adam / 10


@pytest.mark.parametrize("name", ["lr", "tv"])
def test_settings_that_are_no_numbers_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} nan"):
        InvertingGradients(**{name: float("nan")})  # type: ignore[arg-type]


def test_optimizers_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"signed=False"):
        InvertingGradients(optimizer="l-bfgs")
    with pytest.raises(ConfigError, match="adam"):
        InvertingGradients(optimizer="adm")


def test_what_a_norm_leaves_of_an_image_is_not_clipped_away() -> None:
    # Behind a batch norm the gradient of 8 x is that of x: a search may well end there.
    x = images(3, (1, 8, 8))

    class Given(DLG):
        """Its own start is no number, so that the given one is the best."""

        def start(self, trials: Trials, generator: torch.Generator) -> dict[str, Tensor]:
            unknowns = super().start(trials, generator)
            return {**unknowns, "images": unknowns["images"] * torch.nan}

    found = Given(iterations=1, restarts=1).reconstruct(
        observe(tiny(norm=True), x, torch.tensor([0, 1, 2])),
        generator=derive(0, "attack"),
        guesses=list(8 * x[:, None, None]),
    )
    got = torch.cat([one.images[0] for one in found])
    low, high = x.amin(dim=(1, 2, 3), keepdim=True), x.amax(dim=(1, 2, 3), keepdim=True)
    assert torch.allclose(got, (x - low) / (high - low), atol=1e-5)


def test_an_image_far_out_of_range_is_stretched_and_any_other_clipped() -> None:
    ramp = torch.linspace(0, 1, 12).view(1, 3, 2, 2)
    x = torch.cat([20 * ramp - 5, 1.4 * ramp - 0.2, torch.zeros_like(ramp)])
    got = in_range(x[None])[0]
    assert torch.allclose(got[0], ramp[0], atol=1e-6)
    assert torch.equal(got[1], x[1].clamp(0, 1))
    assert torch.equal(got[2], x[2])
