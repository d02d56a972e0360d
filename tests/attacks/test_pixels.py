"""Inverting Gradients by L-BFGS."""

from __future__ import annotations

import pytest
import torch
from attackhelp import images, lenet, observe

from fedkl import metrics
from fedkl.attacks import InvertingGradients
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


def test_optimizers_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"signed=False"):
        InvertingGradients(optimizer="l-bfgs")
    with pytest.raises(ConfigError, match="adam"):
        InvertingGradients(optimizer="adm")
