"""Private layers: that they still play their part once locked, and the laws they are drawn by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedkl.errors import LockError
from fedkl.key import Key
from fedkl.locking import is_locked, lock, lock_spec
from fedkl.rng import derive

KEY = Key._of("seed", bytes(range(32)))  # the same in every run: figures below depend on it
X = torch.rand(4, 3, 8, 8, generator=derive(0, "x"))


class Choosy(nn.Module):
    """Calls some of its layers only if they are of the very class that torch has."""

    def __init__(self, *skips: str, always: bool = False) -> None:
        super().__init__()
        self.skips, self.always = skips, always
        self.early, self.conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.mid = nn.BatchNorm2d(3), nn.Linear(192, 192)
        self.out, self.second = nn.Linear(192, 192), nn.Linear(192, 192)

    def call(self, name: str, x: Tensor) -> Tensor:
        module = getattr(self, name)
        known = type(module) in (nn.Conv2d, nn.Linear)
        return module(x) if known or name not in self.skips else x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.call("conv", self.call("early", x))).relu()
        z = self.mid(y.flatten(1)).relu()
        # What the stem computes may still be heard, past the lock.
        more = self.early(x).mean() if self.always else 0
        return self.call("out", z) + more, self.call("second", z)


@pytest.mark.filterwarnings("ignore::fedkl.errors.ShortcutWarning")
@pytest.mark.parametrize("scheme", ["pad", "open-pad"])
@pytest.mark.parametrize("skips", [("conv", "early"), ("early",), ("out",), ("second", "conv")])
def test_a_private_layer_that_is_skipped_once_locked_is_an_error(
    skips: tuple[str, ...], scheme: str
) -> None:
    model = Choosy(*skips)
    how = {"scheme": scheme, "example": X, "head": True, "layers": "norm"}
    with pytest.raises(LockError, match=rf"play no part.*{skips[0]}.*isinstance"):
        lock(model, KEY, **how, inplace=True)  # type: ignore[arg-type]
    assert not is_locked(model)
    lock(Choosy(), KEY, **how)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::fedkl.errors.ShortcutWarning")
def test_a_stem_that_is_heard_past_the_lock_alone_is_skipped_too() -> None:
    with pytest.raises(LockError, match=r"play no part.*early"):
        lock(Choosy("early", always=True), KEY, scheme="pad", example=X, layers="norm")


def test_a_parameter_that_no_run_reads_is_no_layer_that_is_skipped() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.spare = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t()

    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.ReLU(), Spare())
    locked = lock(net, KEY, scheme="pad", example=torch.rand(4, 4))
    assert {"4.weight", "4.spare"} <= {*lock_spec(locked).private}
