"""What a client notices of a crafted global state, and what it lets pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fedhelp import config, digits
from torch import Tensor

from fedkl.attacks.adaptive import craft
from fedkl.federation import run
from fedkl.federation.checkpoint import Checkpoints
from fedkl.federation.session import Session
from fedkl.federation.trust import suspicious
from fedkl.models import build
from fedkl.rng import derive


def state(name: str = "lenet", size: int = 32) -> dict[str, Tensor]:
    model = build(name, num_classes=10, channels=1, image_size=size, generator=derive(0, name))
    return {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("name", ["lenet", "resnet20", "resnet18"])
def test_fresh_models_are_ordinary(name: str) -> None:
    assert suspicious(None, state(name)) == []


@pytest.mark.slow
@pytest.mark.parametrize("defense", ["none", "norm", "channel"])
@pytest.mark.parametrize("model", ["lenet", "fedhelp:normed"])
def test_honest_rounds_are_silent(defense: str, model: str, tmp_path: Path) -> None:
    settings = config(
        defense,
        model={"name": model},
        federation={"rounds": 4},
        training={"batch_size": 16, "lr": 0.1},
        evaluation={"every": 0, "images": 20, "wrong_keys": 1},
        checkpoint_every=1,
    )
    before = Session(settings, tmp_path / "other", digits()).initial()
    run(settings, tmp_path / "run", bundle=digits())
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert suspicious(None, before) == []
    for round_ in checkpoints.rounds():
        now = checkpoints.load(round_).shared
        assert suspicious(before, now) == []
        before = dict(now)


def test_fishing_is_noticed() -> None:
    honest = state()
    crafted = craft(honest, 3, weight="fc.weight", bias="fc.bias")
    found = " ".join(suspicious(honest, crafted))
    assert "9 of 10 rows have all but vanished" in found
    assert "fc.bias: entry 3" in found
    assert "fc.bias moved by" in found
    first = " ".join(suspicious(None, crafted))  # without a round before it, the first two remain
    assert "9 of 10 rows" in first
    assert "entry 3" in first


def test_a_huge_row_is_noticed() -> None:
    crafted = state()
    crafted["fc.weight"][4] *= 1000
    assert any("of the other classes" in w for w in suspicious(None, crafted))


def test_a_single_vanished_row_is_noticed() -> None:
    crafted = state()
    crafted["fc.weight"][4] *= 1e-4
    assert any("1 of 10 rows" in w for w in suspicious(None, crafted))


@pytest.mark.parametrize("sign", [1, -1])
def test_imprinting_is_noticed(sign: int) -> None:
    """Rows that all measure brightness, as Fowl et al. 2022 have it; their biases are the bins."""
    crafted = state("fedhelp:mlp", 16)
    rows = torch.ones_like(crafted["1.weight"])
    rows[::2] *= sign
    crafted["1.weight"] = rows * torch.rand(len(rows), 1, generator=derive(0))
    found = suspicious(None, crafted)
    assert len(found) == 1
    assert "1.weight: 12 of 12 rows point the same way" in found[0]


def test_a_jump_and_what_is_not_finite_are_noticed() -> None:
    honest = state()
    jumped = {**honest, "conv2.weight": honest["conv2.weight"] + 5}
    assert any("conv2.weight moved by" in w for w in suspicious(honest, jumped))
    broken = {**honest, "conv1.bias": torch.full_like(honest["conv1.bias"], torch.nan)}
    assert suspicious(honest, broken) == ["conv1.bias holds NaN or infinity."]


def test_statistics_counters_and_other_shapes_are_no_matter() -> None:
    before = state("resnet20")
    after = {n: t.clone() for n, t in before.items()}
    for name in after:
        if name.endswith(("running_var", "num_batches_tracked")):
            after[name] = after[name] + 1000
    assert suspicious(before, after) == []
    assert suspicious({**before, "fc.bias": torch.zeros(3)}, after) == []
    assert suspicious(None, {}) == []
