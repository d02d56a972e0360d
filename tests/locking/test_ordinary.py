"""Ordinary models that do something out of the ordinary: they are locked, or told why not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedkl.errors import LockError
from fedkl.key import Key
from fedkl.locking import is_locked, lock, set_key, sources_of, unlock
from fedkl.rng import derive

KEY = Key.generate()
X = torch.rand(4, 3, 8, 8, generator=derive(0, "x"))
Y = torch.arange(4) % 3


class Checkpointed(nn.Module):
    """Keeps no activations of its middle, in the old way or the new."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.middle = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.last, self.fc = nn.Conv2d(4, 4, 3), nn.Linear(4, 5)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant)
        out: Tensor = self.fc(F.relu(self.last(x)).mean((2, 3)))
        return out


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("scheme", ["channel", "pad"])
def test_reentrant_checkpoints_are_told_what_to_do(scheme: str) -> None:
    model = Checkpointed(reentrant=True)
    with pytest.raises(LockError, match="use_reentrant=False"):
        lock(model, KEY, scheme=scheme, example=X, inplace=True)
    assert not is_locked(model)
    lock(Checkpointed(reentrant=False), KEY, scheme=scheme, example=X)


class Conditional(nn.BatchNorm2d):
    """Scales by what a class says, as well."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.table = nn.Embedding(3, features)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = super().forward(x) * (1 + self.table(y)[:, :, None, None])
        return out


class Calls(nn.Module):
    """Calls its norm by keyword, or with something more."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), norm
        self.mid, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.conv(input=x)
        x = self.norm(x, y) if isinstance(self.norm, Conditional) else self.norm(input=x)
        out: Tensor = self.fc(F.relu(self.mid(x)).mean((2, 3)))
        return out


@pytest.mark.parametrize("scheme", ["channel", "pad"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), Conditional(8), nn.GroupNorm(2, 8)])
def test_norms_that_are_called_in_other_ways(norm: nn.Module, scheme: str) -> None:
    plain = Calls(norm).eval()
    model = lock(plain, KEY, scheme=scheme, example=(X, Y), layers="norm").eval()
    before = model(X, Y)
    assert torch.equal(unlock(model)(X, Y), plain(X, Y))
    set_key(model, Key.generate())
    assert not torch.allclose(model(X, Y), before, atol=1e-4)
    model.train()(X, Y).sum().backward()


def test_an_rms_norm_that_is_called_by_keyword() -> None:
    model = lock(nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3)), KEY)
    rows = torch.rand(4, 8)
    assert torch.equal(model[1](x=rows), model[1](rows))  # type: ignore[index, operator]


def test_a_head_with_a_lock_in_front_that_is_called_by_keyword() -> None:
    model: Any = lock(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)),
        *(KEY,),
        **{"scheme": "pad", "example": X, "lock_head_input": True, "head": False},
    )
    model.eval()
    rows = torch.rand(4, 144)
    assert torch.equal(model[3](input=rows), model[3](rows))


def test_slices_of_a_sequence_behind_which_a_lock_stands() -> None:
    plain = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)),
    )
    model: Any = lock(plain, KEY, scheme="pad", example=X, behind="0").eval()
    stem = model[0]
    part = stem[:2]
    assert type(part) is nn.Sequential
    torch.testing.assert_close(part(X), F.relu(stem[0](X)))
    torch.testing.assert_close(stem[:](X), stem(X), rtol=0, atol=0)
    torch.testing.assert_close(stem[2:](part(X)), stem(X), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(stem)[:](X), stem(X), rtol=0, atol=0)


def test_slices_of_a_sequence_over_tokens() -> None:
    tokens = torch.randint(5, (4, 6), generator=derive(0, "tokens"))
    plain = nn.Sequential(nn.Sequential(nn.Embedding(5, 8), nn.Dropout(0.0)), nn.Linear(8, 3))
    model: Any = lock(plain, KEY, scheme="pad", example=tokens, behind="0", head=False).eval()
    torch.testing.assert_close(model[0][1:](model[0][0](tokens)), model[0](tokens))


class Tagged(nn.Conv2d):
    """A layer whose subclasses have to say more."""

    def __init_subclass__(cls, *, tag: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)


class TaggedNorm(nn.BatchNorm2d):
    """The same of a norm."""

    def __init_subclass__(cls, *, tag: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)


@pytest.mark.parametrize("scheme", ["channel", "pad"])
@pytest.mark.parametrize("kind", [Tagged, TaggedNorm])
def test_classes_that_cannot_be_exchanged_are_told(kind: type, scheme: str) -> None:
    first = [Tagged(3, 4, 3)] if kind is Tagged else [nn.Conv2d(3, 4, 3), TaggedNorm(4)]
    model = nn.Sequential(*first, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    before = [(n, type(m), [*m._parameters]) for n, m in model.named_modules()]
    state = [*model.state_dict()]
    with pytest.raises(LockError, match=rf"{kind.__name__} .*subclass.*TypeError"):
        lock(model, KEY, scheme=scheme, example=X, inplace=True)
    assert [(n, type(m), [*m._parameters]) for n, m in model.named_modules()] == before
    assert [*model.state_dict()] == state


def test_a_replica_on_another_device_takes_the_pad_there() -> None:
    """As DataParallel makes them: parameters and buffers move, attributes do not."""
    model = lock(Calls(nn.BatchNorm2d(8)), KEY, scheme="pad", example=(X, Y), layers="norm")
    (pad,) = sources_of(model).values()
    for name, parameter in pad.named_parameters():
        setattr(pad, name, nn.Parameter(parameter.to("meta")))
    pad.epoch = pad.epoch.to("meta")  # type: ignore[assignment]
    pad._version = pad.epoch._version  # type: ignore[assignment]
    assert pad.scale().is_meta
