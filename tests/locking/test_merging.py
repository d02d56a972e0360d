"""merge: the ordinary model computes what the locked one does, however its layers are used."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.errors import LockError
from fedkl.key import Key
from fedkl.locking import is_locked, lock, merge, unlock
from fedkl.rng import derive

KEY = Key.generate()
X = torch.rand(4, 3, 16, 16, generator=derive(0, "x"))


class Order(nn.Module):
    """Goes over its layers by a list beside the registered ones, and one in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.order, self.heads = [self.a, self.b], {"main": (self.fc,)}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = F.relu(layer(x))
        out: Tensor = self.heads["main"][0](x.mean((2, 3)))
        return out


class Reads(nn.Module):
    """Reads its layers' attributes, and calls one with more arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 3, 2, 1)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.down(x.to(self.down.weight.dtype)))
        h = F.relu(self.up(input=h, output_size=x.shape[-2:]))
        out: Tensor = self.out(h).mean((2, 3))
        return out


class Blocks(nn.Module):
    """A block with layers of its own, in two places, and a list of blocks beside."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        self.two, self.fc = nn.ModuleList([self.one]), nn.Linear(3, 5)
        self.__dict__["same"] = [self.one[0]]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.same[0](self.two[0](self.one(x))).mean((2, 3)))
        return out


class Picky(nn.Module):
    """Looks at the class of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x)) if isinstance(self.a, nn.Linear) else F.pad(x, (0, 2))
        out: Tensor = self.fc(x)
        return out


@pytest.mark.parametrize("make", [Order, Reads, Blocks])
def test_layers_that_are_reached_read_or_called_in_other_ways(
    make: Callable[[], nn.Module],
) -> None:
    plain = make().eval()
    model = lock(plain, KEY, example=X).eval()
    merged = merge(model, example=X)
    assert not is_locked(merged)
    assert not torch.allclose(model(X), plain(X), atol=1e-3)
    for one in (merged, pickle.loads(pickle.dumps(merged)), copy.deepcopy(merged)):
        torch.testing.assert_close(one(X), model(X), rtol=1e-5, atol=1e-6)


def test_an_example_on_which_the_merged_model_is_another_is_told() -> None:
    x = torch.rand(4, 6, generator=derive(0, "rows"))
    model = lock(Picky(), KEY, layers="a", example=x)
    with pytest.raises(LockError, match="merged model computes something else"):
        merge(model, example=x)
    with pytest.raises(LockError, match="does not run on the example"):
        merge(model, example=x[:, :5])
    assert model.training
    assert not is_locked(merge(model))


class OwnWay(nn.Linear):
    """A layer that says itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnWay:
        new = OwnWay(self.in_features, self.out_features)
        new.load_state_dict(self.state_dict(), strict=False)
        return new


def test_a_layer_with_a_copy_of_its_own_is_copied_with_its_norm() -> None:
    x = torch.rand(4, 6, generator=derive(0, "rows"))
    plain = nn.Sequential(OwnWay(6, 8), nn.ReLU(), nn.Linear(8, 5))
    merged = merge(lock(plain, KEY, example=x), example=x).eval()
    torch.testing.assert_close(copy.deepcopy(merged)(x), merged(x), rtol=0, atol=0)


class Caches(nn.Module):
    """Keeps what it put out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        self.last: Tensor = self.net(x)
        return self.last


@pytest.mark.parametrize("verb", [unlock, merge])
def test_what_torch_cannot_copy_is_told_with_a_remedy(verb: Callable[[nn.Module], Any]) -> None:
    model: Any = lock(Caches(), KEY)
    model(torch.rand(4, 6))
    with pytest.raises(LockError, match=r"cannot be copied \(RuntimeError.*cached activations"):
        verb(model)
    model.last = None
    verb(model)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("behind", ["0", "1"])
def test_a_merged_model_can_be_locked_again(behind: str, inplace: bool) -> None:
    plain = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    merged = merge(lock(plain, KEY, example=X, behind=behind)).eval()
    before, names = merged(X), [n for n, _ in merged.named_modules()]
    again = lock(merged, KEY, example=X, behind=behind, inplace=inplace)
    twice = merge(again, example=X)
    assert len([*twice.modules()]) > len(names)
    opened = unlock(again, inplace=True)
    for model in (merged, opened):
        assert [n for n, _ in model.named_modules()] == names
        torch.testing.assert_close(model(X), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("where", "child"), [("0", "inserted_norm"), ("3", "inserted_norm"), ("1", "keylock")]
)
def test_a_name_that_a_lock_needs_and_another_has(where: str, child: str) -> None:
    norm = nn.BatchNorm2d(4) if child == "keylock" else nn.Identity()
    model = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), norm, nn.Flatten()),
        *(nn.Linear(784, 8), nn.Linear(8, 5)),
    )
    model.get_submodule(where).add_module(child, nn.Identity())
    before = [(n, type(m), [*m._modules]) for n, m in model.named_modules()]
    how: dict[str, Any] = {"behind": "0", "example": X} if where == "0" else {"layers": [where]}
    with pytest.raises(LockError, match=rf"has something called {child} .*rename"):
        lock(model, KEY, inplace=True, **how)
    assert [(n, type(m), [*m._modules]) for n, m in model.named_modules()] == before


class Peers(nn.Conv2d):
    """Knows other layers that are no children of its own."""

    peers: tuple[nn.Module, ...] = ()


def test_layers_that_refer_to_each_other_are_refused() -> None:
    layers = [Peers(3, 4, 3), Peers(4, 4, 3)]
    layers[0].peers = (layers[1],)  # a tuple, of which torch takes no notice
    model = lock(nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 5)), KEY, example=X)
    with pytest.raises(LockError, match=r"Peers without having it"):
        merge(model)
