"""Models that keep a copy of their weights: what follows private ones is not sent."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedkl.errors import LockError, SecretError
from fedkl.key import Key
from fedkl.locking import lock, set_key, shared_state, unlock
from fedkl.rng import derive

KEY = Key.generate()
X = torch.rand(4, 3, 8, 8, generator=derive(0, "x"))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    )


class Shadowed(nn.Module):
    """Keeps a moving average of one of its layers, as a teacher does."""

    def __init__(self, layer: int, how: str = "parameter") -> None:
        super().__init__()
        self.net, self.layer, self.how = cnn(), layer, how
        self.shadow = copy.deepcopy(self.net[layer]).requires_grad_(False)
        if how == "buffer":
            del self.shadow.weight
            self.shadow.register_buffer("weight", torch.zeros_like(self.net[layer].weight))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                mine, theirs = self.net[self.layer].weight, self.shadow.weight
                if self.how == "data":
                    theirs.data = theirs.data * 0.99 + mine.data * 0.01
                else:
                    theirs.lerp_(mine, 0.01)
        out: Tensor = self.net(x)
        return out


class Codes(nn.Module):
    """Moves a parameter by features behind the first lock, as codebooks do."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.codes = cnn(), nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[:4](x)
        if self.training:
            with torch.no_grad():
                self.codes.lerp_(x.mean((0, 2, 3)), 0.1)
        out: Tensor = self.net[4:](x)
        return out


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("how", ["parameter", "data", "buffer"])
@pytest.mark.parametrize("layer", [0, 8])  # stem and head
def test_a_copy_of_a_private_layer_is_refused(layer: int, how: str) -> None:
    model = Shadowed(layer, how)
    before = state_of(model)
    with pytest.raises(LockError, match=r"shadow\.weight follows? .*outside"):
        lock(model, KEY, scheme="pad", example=X, inplace=True)
    assert same(model, before)


def test_a_copy_of_what_a_lock_computes_is_refused() -> None:
    with pytest.raises(LockError, match=r"shadow\.weight follows"):
        lock(Shadowed(1), KEY, example=X, layers=r"net\..*")


@pytest.mark.parametrize(("layer", "scheme"), [(3, "pad"), (0, "channel"), (1, "norm")])
def test_a_copy_of_a_shared_layer_is_no_secret(layer: int, scheme: str) -> None:
    key = None if scheme == "norm" else KEY
    model = Shadowed(layer)
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        locked: Any = lock(model, key, scheme=scheme, example=X, layers=r"net\..*", inplace=True)
    assert torch.equal(locked.shadow.weight, before["shadow.weight"])
    assert torch.equal(locked.net[3].weight, before["net.3.weight"])
    shared_state(locked)


def test_parameters_that_move_by_locked_features_are_no_copy() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        locked: Any = lock(Codes(), KEY, scheme="pad", example=X)
    assert not locked.codes.any()


class Mutexed(nn.Conv2d):
    """A layer with an attribute that cannot be copied, and a state that leaves it out."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.mutex = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "mutex"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mutex = threading.Lock()


class OwnWay(nn.Conv2d):
    """A layer that says itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnWay:
        new = OwnWay(self.in_channels, self.out_channels, 3, padding=1)
        memo[id(self)] = new
        new.load_state_dict(self.state_dict())
        new.__dict__["times"] = self.__dict__.get("times", 0) + 1
        return new


@pytest.mark.parametrize("scheme", ["pad", "channel"])
def test_copies_do_not_call_what_was_compiled_of_the_old_layers(scheme: str) -> None:
    plain = cnn().eval()
    model: Any = lock(plain, KEY, scheme=scheme, example=X).eval()
    for layer in (0, 1):
        model[layer].compile(backend="eager")
    with torch.no_grad():
        before = model(X)
        twin: Any = copy.deepcopy(model)
        set_key(twin, Key.generate())
        assert not torch.allclose(twin(X), before, atol=1e-3)
        twin[0].weight.zero_()
        assert not torch.allclose(twin[0](X), model[0](X))
        torch.testing.assert_close(unlock(model)(X), plain(X), rtol=0, atol=0)
        torch.testing.assert_close(model(X), before)


def test_a_layer_is_copied_as_it_says_itself() -> None:
    plain = nn.Sequential(Mutexed(3, 4), *list(cnn())[1:])
    model: Any = lock(plain, KEY, scheme="pad", example=X).eval()
    twin: Any = copy.deepcopy(model)
    assert twin[0].mutex is not model[0].mutex
    assert type(twin[0]) is type(model[0])
    torch.testing.assert_close(twin(X), model(X), rtol=0, atol=0)
    assert list(shared_state(twin)) == list(shared_state(model))
    opened: Any = unlock(model)
    assert type(opened[0]) is Mutexed
    assert torch.equal(opened[0].weight, plain[0].weight)
    for part in (model, twin, twin[0]):
        with pytest.raises(SecretError):
            pickle.dumps(part)


def test_a_layer_with_a_copy_of_its_own_stays_private() -> None:
    plain = nn.Sequential(OwnWay(3, 4, 3, padding=1), *list(cnn())[1:])
    model: Any = lock(plain, KEY, scheme="pad", example=X).eval()
    twin: Any = copy.deepcopy(model)
    assert twin[0].times > 0
    torch.testing.assert_close(twin(X), model(X), rtol=0, atol=0)
    assert list(shared_state(twin)) == list(shared_state(model))
    opened: Any = unlock(twin)
    assert type(opened[0]) is OwnWay
    assert torch.equal(opened[0].weight, plain[0].weight)
    with pytest.raises(SecretError):
        pickle.dumps(twin[0])
