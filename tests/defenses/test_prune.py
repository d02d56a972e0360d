"""Pruning of updates: what is left of them, and what is not touched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedkl.defenses import DefenseConfig, Prune, Sending, make_defense
from fedkl.errors import ConfigError
from fedkl.rng import derive

GENERATOR = derive(0, "unused")


def sending(received: Any = None) -> Sending:
    return Sending(received, ["w", "b"], GENERATOR)


def test_weights_go_back_to_what_was_received_where_little_changed() -> None:
    received = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([5.0])}
    update = {"w": torch.tensor([1.1, 0.0, 3.2, 7.0]), "b": torch.tensor([5.0])}
    found = Prune(prune_ratio=0.5).share(update, sending(received))
    assert found["w"].tolist() == [1.0, 0.0, 3.0, 7.0]
    assert found["b"].tolist() == [5.0]
    assert update["w"][0] == torch.tensor(1.1)  # not in place


def test_gradients_are_zero_there_and_every_tensor_keeps_an_entry() -> None:
    update = {"w": torch.tensor([[0.1, -3.0], [2.0, 0.2]]), "b": torch.tensor([1e-9, 0.0])}
    found = Prune(prune_ratio=0.99).share(update, sending())
    assert found["w"].tolist() == [[0.0, -3.0], [0.0, 0.0]]
    assert torch.equal(found["b"], update["b"])


def test_buffers_go_as_they_are() -> None:
    update = {
        "w": torch.tensor([1.0, 2.0]),
        "mean": torch.tensor([1.0, 2.0]),
        "seen": torch.tensor(3),
    }
    start = {name: torch.zeros_like(value) for name, value in update.items()}
    found = Prune(prune_ratio=0.5).share(update, sending(start))
    assert found["w"].tolist() == [0.0, 2.0]
    assert torch.equal(found["mean"], update["mean"])
    assert torch.equal(found["seen"], update["seen"])


def test_a_ratio_of_zero_sends_everything_and_nothing_is_drawn() -> None:
    update = {"w": torch.randn(9, generator=derive(1, "w"))}
    before = GENERATOR.get_state()
    assert torch.equal(Prune(prune_ratio=0).share(update, sending())["w"], update["w"])
    Prune().share(update, sending())
    assert torch.equal(GENERATOR.get_state(), before)


def test_by_name_with_its_setting() -> None:
    value = make_defense(DefenseConfig(name="prune", prune_ratio=0.25))
    assert repr(value) == "Prune(prune_ratio=0.25)"
    assert value.known == {"prune_ratio": 0.25}
    assert make_defense(DefenseConfig(name="prune")).known == {"prune_ratio": 0.9}


@pytest.mark.parametrize("name", ["prune", "norm+prune", "none"])
@pytest.mark.parametrize("ratio", [1.0, -0.1, 2.0, math.nan])
def test_a_bad_ratio_is_refused_at_once(name: str, ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"prune_ratio must be in \[0, 1\), got .* Give 0\.9"):
        DefenseConfig(name=name, prune_ratio=ratio)
