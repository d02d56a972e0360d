"""Where all ways meet, against cutting every module off by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from fedkl.locking import meeting_points
from fedkl.locking.passing import passes_by
from fedkl.models import CifarResNet
from fedkl.rng import derive

from .test_behind import TOKENS, Text, _vit

IMAGES = torch.rand(2, 3, 32, 32, generator=derive(0, "x"))


class Diamond(nn.Module):
    """Two ways that part, cross and meet, one output that leaves early."""

    def __init__(self, *, early: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.join, self.fc, self.early = nn.ReLU(inplace=True), nn.Linear(3, 2), early

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        left, right = self.a(x), self.b(x)
        right = self.c(left + right)
        out = self.fc(self.join(left * right).mean((2, 3)))
        return (out, left.mean()) if self.early else (out,)


class Halves(nn.Module):
    """A tensor is parted, and both halves come out of one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.drop, self.fc = nn.Conv2d(3, 6, 3), nn.Dropout(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        out: Tensor = self.fc(torch.cat([self.drop(left), right], 1).mean((2, 3)))
        return out


class Auxiliary(nn.Module):
    """In train mode something leaves early, and a target comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Dropout()
        self.fc, self.side = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        early = self.norm(self.stem(x))
        out: Tensor = self.fc(self.stage(early).mean((2, 3)))
        if self.training:
            return (out + self.side(early.mean((2, 3))) - target).square().mean()
        return out


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, set[str], set[str]]] = {
    # model, example, some that are, some that are not
    "residual": (
        lambda: CifarResNet(1, 10, 3), IMAGES, {"conv1", "bn1", "layer1", "layer2", "layer3"},
        {"layer1.0.conv1", "layer1.0.bn2", "layer2.0.bn1"},
    ),
    "diamond": (lambda: Diamond(early=False), IMAGES, {"join", "fc"}, {"a", "b", "c"}),
    "two outputs": (lambda: Diamond(early=True), IMAGES, set(), {"a", "join", "fc"}),
    "text": (Text, TOKENS, {"embed", "blocks.0", "blocks"}, {"blocks.0.norm1"}),
    "vision transformer": (
        _vit, IMAGES[..., :16, :16], {"conv_proj", "encoder.layers.encoder_layer_0", "encoder"},
        {"encoder.layers.encoder_layer_0.ln_1"},
    ),
    "dense": (
        lambda: get_model("densenet121", weights=None, num_classes=3), IMAGES,
        {"features.transition1", "features.denseblock2"}, {"features.denseblock1.denselayer1"},
    ),
    "branches": (
        lambda: get_model("squeezenet1_1", weights=None, num_classes=3), IMAGES,
        {"features.3", "features.3.squeeze"}, {"features.3.expand1x1"},
    ),
}  # fmt: skip


@pytest.fixture(params=list(CASES), name="case")
def _case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, set[str], set[str]]:
    make, example, are, are_not = CASES[request.param]
    return make(), example, are, are_not


def test_known(case: tuple[nn.Module, Tensor, set[str], set[str]]) -> None:
    model, example, are, are_not = case
    found = meeting_points(model, example)
    assert are <= set(found)
    assert not are_not & set(found)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_nothing_goes_around_them_and_something_around_others(
    case: tuple[nn.Module, Tensor, set[str], set[str]],
) -> None:
    """The naive reference: cut the module's output off, and ask whether the input is heard."""
    model, example, _, are_not = case
    found = meeting_points(model, example)
    with torch.no_grad():
        for p in model.parameters():  # heads that start at zero hear nothing at all
            p.add_(0.02 * torch.randn(p.shape, generator=derive(0, "noise")))
    for name in found[:: max(1, len(found) // 6)]:
        assert not passes_by(model, name, example), name
    for name in are_not - {"join", "fc"} if not found else are_not:
        assert passes_by(model, name, example), name


def test_half_of_a_tensor_is_not_all_of_it() -> None:
    assert meeting_points(Halves(), IMAGES) == ["stem", "fc"]


def test_in_train_mode_nothing_may_leave_before_either() -> None:
    model = Auxiliary()
    assert meeting_points(model, (IMAGES, torch.rand(2, 2))) == ["norm"]
    assert passes_by(model, "stage", (IMAGES, torch.rand(2, 2)))
    assert not passes_by(model, "norm", (IMAGES, torch.rand(2, 2)))


def test_they_come_as_they_run() -> None:
    with torch.no_grad():
        found = meeting_points(CifarResNet(1, 10, 3), IMAGES)
    assert found[:4] == ["conv1", "bn1", "relu1", "layer1"]
    assert found[-3:] == ["pool", "flatten", "fc"]
