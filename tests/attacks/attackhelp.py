"""Small victims for tests of attacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkl.models import build
from fedkl.observation import OPEN, Observation, Training
from fedkl.rng import derive

CLASSES = 4


def tiny(channels: int = 1, size: int = 8, *, norm: bool = False) -> nn.Module:
    """A convolution, perhaps a batch norm, a sigmoid, a linear layer; weights U(-0.5, 0.5)."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 6, 3, padding=1)]
    if norm:
        layers.append(nn.BatchNorm2d(6))
    layers += [nn.Sigmoid(), nn.Flatten(), nn.Linear(6 * size * size, CLASSES)]
    return uniform(nn.Sequential(*layers), 0)


def uniform(model: nn.Module, seed: int, half: float = 0.5) -> nn.Module:
    """``model`` with weights uniform in ±half (in place)."""
    generator = derive(seed, "uniform")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(half * (2 * torch.rand(parameter.shape, generator=generator) - 1))
    return model


def lenet(channels: int = 1, size: int = 32) -> nn.Module:
    """The paper's LeNet with DLG's weights."""
    model = build(
        "lenet", num_classes=10, channels=channels, image_size=size, generator=derive(0, "lenet")
    )
    return uniform(model, 0)


def images(count: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Smooth random images (count, *shape) in [0, 1]."""
    x = torch.rand((count, *shape), generator=derive(seed, "images"))
    return torch.nn.functional.avg_pool2d(x, 3, 1, 1)


def gradient_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradient a client would send, by plain autograd."""
    model.train()
    model.zero_grad()
    cross_entropy(model(x), y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def observe(model: nn.Module, x: Tensor, y: Tensor, *, classes: int = CLASSES) -> list[Observation]:
    """One batch-1 observation per image."""
    return [
        Observation(
            model=model,
            kind="gradient",
            changes=(gradient_of(model, x[i : i + 1], y[i : i + 1]),),
            image_shape=tuple(x.shape[1:]),
            num_classes=classes,
            training=Training(),
            threat=OPEN,
        )
        for i in range(len(x))
    ]
