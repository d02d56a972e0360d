"""Defenses as values: by name, composed, and what their hooks do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedkl.defenses import (
    DEFENSES,
    Composed,
    Defense,
    DefenseConfig,
    LockDefense,
    NoDefense,
    Sending,
    make_defense,
)
from fedkl.errors import ConfigError, LockError
from fedkl.key import Key
from fedkl.locking import Channel, is_locked, lock_spec
from fedkl.rng import derive

X = torch.zeros(4, 3)
SENDING = Sending(None, ["w"], derive(0, "noise"))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


class Noted(Defense):
    """Writes down its hooks; adds a number on the way out and takes it off on the way in."""

    def __init__(self, name: str, notes: list[str], add: float, times: float) -> None:
        self.name, self.notes, self.add, self.times = name, notes, add, times

    def step(self, gradients: Sequence[Tensor]) -> None:
        self.notes.append(f"step {self.name}")
        for gradient in gradients:
            gradient.mul_(self.times).add_(self.add)

    def share(self, update: Mapping[str, Tensor], sending: Sending) -> dict[str, Tensor]:
        self.notes.append(f"share {self.name}")
        return {n: t * self.times + self.add for n, t in update.items()}

    def receive(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.notes.append(f"receive {self.name}")
        return {n: (t - self.add) / self.times for n, t in state.items()}


def test_by_name() -> None:
    assert set(DEFENSES) >= {"none", "norm", "fedbn", "channel"}
    for name in ("none", "norm", "fedbn", "channel"):
        value = make_defense(DefenseConfig(name=name))
        assert value.name == name
        assert value.keyed == (name == "channel")
        locked = value.prepare(net(), Key.generate() if value.keyed else None, X)
        assert is_locked(locked) == (name != "none")


def test_no_defense_is_the_identity() -> None:
    value, model = NoDefense(), net()
    tensors = dict(model.state_dict())
    assert value.prepare(model, None, X) is model
    for found in (value.share(tensors, SENDING), value.receive(tensors)):
        assert found == tensors
        assert found is not tensors
    gradient = torch.ones(2)
    value.step([gradient])
    assert gradient.tolist() == [1.0, 1.0]


def test_settings_reach_the_lock() -> None:
    config = DefenseConfig(
        name="channel", layers="first", norm="group", spread=2.0, length=8, bias=True
    )
    value = make_defense(config)
    assert isinstance(value, LockDefense)
    spec = lock_spec(value.prepare(net(), Key.generate(), X))
    assert (len(spec.sites), spec.norm, spec.statistics_shared) == (1, "group", False)
    scheme = spec.scheme_value()
    assert isinstance(scheme, Channel)
    assert (scheme.spread, scheme.length, scheme.bias) == (2.0, 8, True)


def test_a_setting_wins_over_the_preset() -> None:
    value = make_defense(DefenseConfig(name="channel", preset="paper", length=8))
    assert isinstance(value, LockDefense)
    assert isinstance(value.scheme, Channel)
    assert (value.scheme.activation, value.scheme.length) == ("relu", 8)
    assert value.scheme.spread is None


def test_preparing_leaves_the_model_alone_and_raises_what_lock_raises() -> None:
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    make_defense(DefenseConfig(name="channel")).prepare(model, Key.generate(), X)
    assert not is_locked(model)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with pytest.raises(LockError, match=r"needs a fedkl\.Key"):
        make_defense(DefenseConfig(name="channel")).prepare(model, None, X)
    with pytest.raises(LockError):
        make_defense(DefenseConfig(name="fedbn", layers="nowhere")).prepare(model, None, X)
    with pytest.raises(ConfigError, match="batch"):
        make_defense(DefenseConfig(name="fedbn", norm="btach")).prepare(model, None, X)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "chanel"}, "channel"),
        ({"name": ""}, "unknown defense"),
        ({"name": "norm+"}, "unknown defense"),
        ({"name": "norm+channel"}, "two locks"),
        ({"name": "channel", "preset": "papr"}, "paper"),
        ({"name": "channel", "law": "sgin"}, "sign"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DefenseConfig(**settings)


def test_composed_by_name() -> None:
    value = make_defense(DefenseConfig(name="none + channel"))
    assert isinstance(value, Composed)
    assert (value.name, value.keyed) == ("none+channel", True)
    assert is_locked(value.prepare(net(), Key.generate(), X))
    assert repr(value).startswith("Composed([NoDefense(), LockDefense(Channel(")


def test_composed_hooks_and_their_order() -> None:
    notes: list[str] = []
    value = Composed([Noted("a", notes, 1.0, 1.0), Noted("b", notes, 0.0, 10.0)])
    state = {"w": torch.tensor([1.0, 2.0])}
    sent = value.share(state, SENDING)
    assert sent["w"].tolist() == [20.0, 30.0]
    assert value.receive(sent)["w"].tolist() == [1.0, 2.0]
    gradient = torch.tensor([1.0])
    value.step([gradient])
    assert gradient.tolist() == [20.0]
    assert notes == ["share a", "share b", "receive b", "receive a", "step a", "step b"]
    assert state["w"].tolist() == [1.0, 2.0]


def test_representations_tell_all_but_secrets() -> None:
    text = repr(make_defense(DefenseConfig(name="channel", layers="first")))
    assert "layers='first'" in text
    assert "norm='batch'" in text
