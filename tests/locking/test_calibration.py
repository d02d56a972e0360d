"""Statistics anew: from what a data loader gives, and never spoiled by what is no use."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedkl.errors import DataError, LockError
from fedkl.key import Key
from fedkl.locking import calibrate, estimate_statistics, lock
from fedkl.rng import derive

from .zoo import IMAGE, SMALL

KEY = Key.generate()


def locked() -> nn.Module:
    return lock(SMALL["batch"][0](), KEY, example=IMAGE)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.named_buffers()}


def test_a_loader_of_inputs_and_labels_gives_the_inputs() -> None:
    by_hand = locked()
    by_loader, by_name = copy.deepcopy(by_hand), copy.deepcopy(by_hand)
    labels = torch.arange(len(IMAGE))
    calibrate(by_hand, IMAGE.split(2))
    calibrate(by_loader, DataLoader(TensorDataset(IMAGE, labels), batch_size=2))
    calibrate(by_name, [{"input": x} for x in IMAGE.split(2)])
    for model in (by_loader, by_name):
        assert all(torch.equal(t, buffers(by_hand)[n]) for n, t in model.named_buffers())
    assert bool(by_hand[1].running_mean.any())  # type: ignore[index, union-attr, operator]


@pytest.mark.parametrize(
    "batches, message",
    [
        ([IMAGE * torch.nan], "NaN or infinity"),
        ([IMAGE, IMAGE / 0.0], "NaN or infinity"),
        ([IMAGE * 1e38], "statistics on these batches"),
        ([IMAGE, "x"], "tensor, a dict of them, or"),
        ([{"nothing": IMAGE}], r"does not take a batch.*unexpected keyword.*given it. Pass"),
        ([()], "tensor, a dict of them, or"),
        (IMAGE, r"pass a list of them \(\[x\] for one\)"),
        (None, "got NoneType"),
        (3, "got int"),
    ],
)
def test_what_is_no_use_changes_nothing(batches: Iterable[Any], message: str) -> None:
    model = locked()
    before = buffers(model)
    with pytest.raises(DataError, match=message):
        calibrate(model, batches)
    assert all(torch.equal(t, before[n]) for n, t in model.named_buffers())
    assert model.training


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = SMALL["batch"][0]()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.net(x * mask)
        return out


def test_a_model_of_several_inputs_is_told_to_take_them_by_name() -> None:
    mask = torch.ones_like(IMAGE)
    model = lock(Masked(), KEY, example=(IMAGE, mask))
    with pytest.raises(DataError, match=r"mask.*first part of a tuple.*dict by argument name"):
        calibrate(model, [(IMAGE, mask)])
    calibrate(model, [{"x": IMAGE, "mask": mask}])


def test_a_model_without_a_lock_is_an_error_but_for_the_engine() -> None:
    plain = SMALL["batch"][0]()
    with pytest.raises(LockError, match="not locked"):
        calibrate(plain, [IMAGE])
    estimate_statistics(plain, [IMAGE], every_norm=True)
    assert bool(plain[1].running_mean.any())  # type: ignore[index, union-attr, operator]


def test_instance_norms_that_keep_statistics_are_calibrated_as_well() -> None:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    model = lock(nn.Sequential(nn.Conv2d(1, 4, 3), norm), KEY, layers="1", example=IMAGE[:, :1])
    before = model[1].momentum  # type: ignore[index]
    batches = [IMAGE[:, :1] * 5 + 3, IMAGE[:, :1]]
    calibrate(model, batches)
    with torch.no_grad():
        means = [model[0](x).mean(dim=(0, 2, 3)) for x in batches]  # type: ignore[index, operator]
    wanted = torch.stack(means).mean(dim=0)
    torch.testing.assert_close(model[1].running_mean, wanted)  # type: ignore[index]
    assert model[1].momentum == before  # type: ignore[index]


@pytest.mark.parametrize("scheme", ["fedbn", "open-pad", "pad"])
def test_norms_over_tokens_are_calibrated_like_others(scheme: str) -> None:
    """Of a norm that was inserted and runs over rows: their mean and variance, batch by batch."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(30, 2))
    x = torch.rand(8, 5, 4, generator=derive(0, "tokens")) * 3 + 1
    key = KEY if scheme == "pad" else None
    locked = lock(model, key, scheme=scheme, layers="first", example=x)
    calibrate(locked, [x[:4], x[4:]])
    norm = locked.get_submodule("0.inserted_norm")
    with torch.no_grad():
        rows = nn.functional.linear(x, locked[0].weight, locked[0].bias)  # type: ignore[index]
    batches = rows.reshape(2, 20, 6)
    assert torch.allclose(norm.running_mean, batches.mean((0, 1)), atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(norm.running_var, batches.var(1).mean(0), atol=1e-5)  # type: ignore[arg-type]
