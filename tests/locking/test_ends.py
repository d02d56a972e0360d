"""Output layers: also where their weights are read without a call, or belong to a whole model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.errors import LockError
from fedkl.key import Key
from fedkl.locking import lock, lock_spec, shared_state
from fedkl.rng import derive

KEY = Key.generate()
X = torch.rand(4, 3, 8, 8, generator=derive(0, "x"))


class Trunk(nn.Module):
    """Two convolutions, of which the second is to be shared, and a classifier of some kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.bn(self.conv(x))))).mean((2, 3))


class Root(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(10, 16) * 0.1), nn.Parameter(torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.features(x), self.W, self.b)


class Projected(Trunk):
    """As in CLIP, with a temperature behind."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.scale = nn.Parameter(torch.randn(16, 6)), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.features(x) @ self.proj) * self.scale.exp()


class Frozen(Root):
    def __init__(self) -> None:
        super().__init__()
        self.W.requires_grad_(False)


class Prototypes(Trunk):
    """Distances to prototypes, entry by entry or by ``cdist``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(16, 16), kind
        self.prototypes = nn.Parameter(torch.randn(10, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc(self.features(x)))
        if self.kind == "cdist":
            return -torch.cdist(h, self.prototypes)
        return -(h[:, None] - self.prototypes).square().sum(-1)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.w = nn.LayerNorm(16), nn.Parameter(torch.randn(10, 16) * 0.1)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(self.norm(h), self.w)


class WithMixed(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.head = Mixed()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


class Cosine(Trunk):
    """ArcFace's: the weight of a layer that is never called."""

    def __init__(self, *, normed: bool = False) -> None:
        super().__init__()
        self.mid, self.fc = nn.Linear(16, 16), nn.Linear(16, 10, bias=False)
        self.last = nn.BatchNorm1d(10) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.mid(self.features(x)))
        out: Tensor = self.last(10 * F.linear(F.normalize(h), F.normalize(self.fc.weight)))
        return out


class Scaled(Trunk):
    """A linear classifier with a number of the model's own behind it, which hides nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(16, 10), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.features(x)) * self.scale
        return out


class LowRank(Trunk):
    """A weight that is a product."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(10, 2)), nn.Parameter(torch.randn(2, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.features(x), self.a @ self.b)


class Functional(Trunk):
    """Two layers of the model's own: only the last one is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(9, 16)), nn.Parameter(torch.randn(5, 9))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.features(x), self.one).relu(), self.two)


HEADS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "of the model itself": (Root, {"W", "b"}),
    "a projection and a temperature": (Projected, {"proj", "scale"}),
    "frozen": (Frozen, {"W", "b"}),
    "prototypes by cdist": (lambda: Prototypes("cdist"), {"prototypes"}),
    # The layer before follows from an output entry by entry: both, to be on the safe side.
    "prototypes": (lambda: Prototypes("plain"), {"prototypes", "fc.weight", "fc.bias"}),
    "a parameter beside a norm": (WithMixed, {"head.w"}),
    "never called": (Cosine, {"fc.weight"}),
    "never called, before a last norm": (
        lambda: Cosine(normed=True),
        {"fc.weight", "last.weight", "last.bias"},
    ),
    "with a scale behind": (Scaled, {"fc.weight", "fc.bias", "scale"}),
    "a product": (LowRank, {"a", "b"}),
    "two layers": (Functional, {"two"}),
}


@pytest.mark.parametrize("asked", [None, True])
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_private_whoever_owns_its_weights(kind: str, asked: bool | None) -> None:
    make, head = HEADS[kind]
    locked = lock(make(), KEY, scheme="pad", example=X, head=asked, layers="bn")
    private = {n for n in lock_spec(locked).private if not n.startswith("conv.")}
    assert private == head
    assert {"conv2.weight", "conv2.bias"} <= set(shared_state(locked))
    assert not head & set(shared_state(locked))


def test_an_output_without_a_gradient_tells_no_head() -> None:
    class Deciding(Root):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out if self.training else out.argmax(1)

    with pytest.raises(LockError, match=r"no output.*gradient.*logits.*head=False"):
        lock(Deciding(), KEY, scheme="pad", example=X, head=True)
