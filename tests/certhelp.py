"""Observations small enough to count their directions by hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkl.certificate import Certificate, Prior, certify
from fedkl.observation import THREATS, Observation, Training
from fedkl.rng import derive

CLASSES = 4


class Affine(nn.Module):
    """γ ⊙ x + β with one of each per position, or β alone."""

    def __init__(self, shape: tuple[int, ...], *, scale: bool) -> None:
        super().__init__()
        generator = derive(0, "affine")
        self.beta = nn.Parameter(3 * torch.randn(shape, generator=generator))
        self.gamma = nn.Parameter(torch.randn(shape, generator=generator)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        return (x if self.gamma is None else self.gamma * x) + self.beta


def classified(front: list[nn.Module], features: int) -> nn.Module:
    """``front``, then one linear layer."""
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(features, CLASSES)).double()


def observed(
    model: nn.Module, images: Tensor, labels: Tensor, secrets: tuple[str, ...] = (), **more: object
) -> Observation:
    """T gradients of ``images`` (T, batch, C, H, W), by plain autograd."""
    changes = []
    for x, y in zip(images, labels, strict=True):
        model.train().zero_grad()
        cross_entropy(model(x), y).backward()
        changes.append({n: p.grad.clone() for n, p in model.named_parameters()})
    return Observation(
        model=model,
        kind="gradient",
        changes=tuple(changes),
        image_shape=tuple(images.shape[2:]),
        num_classes=CLASSES,
        training=Training(batch_size=images.shape[1]),
        threat=THREATS["adaptive"],
        secrets=secrets,
        **more,
    )


def pictures(updates: int, shape: tuple[int, ...], *, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Random images (updates, batch, *shape) in float64, and labels.

    No two are alike anywhere: where they are, a scale would be told from a shift at a high price.
    """
    generator = derive(0, "pictures")
    x = torch.rand((updates, batch, *shape), generator=generator, dtype=torch.float64)
    number = torch.arange(updates * batch).view(updates, batch)
    return x / 2 + number[..., None, None, None], number % CLASSES


def certified(
    model: nn.Module,
    updates: int,
    shape: tuple[int, ...],
    secrets: tuple[str, ...] = (),
    *,
    batch: int = 1,
    width: float = 1.0,
) -> list[Certificate]:
    """Certificates for 1 to ``updates`` gradients of ``model``."""
    x, y = pictures(updates, shape, batch=batch)
    named: Mapping[str, Tensor] = dict(model.named_parameters())
    held = {name: named[name].detach() for name in secrets}
    prior = Prior(0.3, 0.01, dict.fromkeys(secrets, width))
    return certify(observed(model, x, y, secrets), x, y, held, prior=prior)
