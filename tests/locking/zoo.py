"""Small networks, one of every kind that a lock can meet, each with an example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Aux(nn.Module):
    """A head that runs in train mode only, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.aux = nn.Sequential(nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.bn(self.conv(x)).relu()
        out = self.head(x.mean((2, 3)))
        return (out, self.aux(x).mean((2, 3))) if self.training else out


class TwoParents(nn.Module):
    """One norm that belongs to two blocks and runs twice."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(4)
        self.a = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(4, 4, 3), norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x)).flatten(1)
        return out


class Late(nn.Module):
    """Registered in another order than executed."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.norm2 = nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4)
        self.first, self.norm1 = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x)).relu()
        out: Tensor = self.norm2(self.second(x)).relu().flatten(1)
        return out


class Dead(nn.Module):
    """A norm that never runs, and one whose output is multiplied by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.unused, self.canceled = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        out: Tensor = x + 0.0 * self.canceled(x)
        return out.flatten(1)


class Tokens(nn.Module):
    """Embedding, an encoder layer, and a head that starts at zero as in ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.embed(tokens)).mean(1))
        return out


class Keyword(nn.Module):
    """Two inputs, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, *, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"logits": self.fc(self.bn(a).relu() + b)}


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


class RootNorm(nn.BatchNorm2d):
    """A model that is itself a norm, with one parameter to share."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.tail = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) * self.tail
        return out


def _cnn(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    )


def _lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.Sigmoid(), nn.Conv2d(6, 8, 2), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(32, 4),
    )  # fmt: skip


def _volume(conv: type[nn.Module], norm: type[nn.Module] | None) -> nn.Sequential:
    layers = [conv(3, 6, 3), *([norm(6)] if norm else []), nn.ReLU(), conv(6, 4, 1)]
    return nn.Sequential(*layers, nn.Flatten())


IMAGE = images(4, 3, 8, 8)
SMALL: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "batch": (lambda: _cnn(nn.BatchNorm2d(8)), IMAGE),
    "batch without affine": (lambda: _cnn(nn.BatchNorm2d(8, affine=False)), IMAGE),
    "batch without statistics": (
        lambda: _cnn(nn.BatchNorm2d(8, track_running_stats=False)),
        IMAGE,
    ),
    "group": (lambda: _cnn(nn.GroupNorm(2, 8)), IMAGE),
    "instance": (lambda: _cnn(nn.InstanceNorm2d(8, track_running_stats=True)), IMAGE),
    "layer": (lambda: _cnn(nn.LayerNorm([8, 6, 6])), IMAGE),
    "layer without bias": (lambda: _cnn(nn.LayerNorm([6, 6], bias=False)), IMAGE),
    "rms": (lambda: _cnn(nn.RMSNorm(6)), IMAGE),
    "no norm": (_lenet, IMAGE),
    "mlp": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, 4)),
        IMAGE,
    ),
    "mlp with norm": (
        lambda: nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4)),
        images(5, 7),
    ),
    "1d": (lambda: _volume(nn.Conv1d, nn.BatchNorm1d), images(4, 3, 8)),
    "3d": (lambda: _volume(nn.Conv3d, None), images(2, 3, 5, 5, 5)),
    "transposed": (lambda: _volume(nn.ConvTranspose2d, None), images(2, 3, 5, 5)),
    "auxiliary head": (Aux, IMAGE),
    "two parents": (TwoParents, IMAGE),
    "late": (Late, IMAGE),
    "tokens": (Tokens, torch.arange(20).reshape(4, 5) % 11),
    "keyword arguments": (Keyword, {"a": images(4, 6), "b": images(4, 6)}),
    "root": (lambda: RootNorm(3), IMAGE),
    "root layer": (lambda: nn.Conv2d(3, 4, 3), IMAGE),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "channel": {"length": 32},
    "paper": {"length": 32},
    "paper-sigmoid": {"length": 32},
    "pad": {"spread": 0.5},
    "open-pad": {},
    "fedbn": {},
    "norm": {},
}
SCHEMES = list(SETTINGS)
POSITIONAL = {"pad", "open-pad"}
