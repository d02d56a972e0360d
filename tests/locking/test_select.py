"""What ``layers`` means, and what happens when it means nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedkl.errors import LockError
from fedkl.key import Key
from fedkl.locking import is_locked, lock, lock_spec, shared_state
from fedkl.models import CifarResNet
from fedkl.rng import derive

from .zoo import IMAGE, SMALL, Aux, Late, images

KEY = Key.generate()


def sites(model: nn.Module, **settings: Any) -> list[str]:
    return [s.name for s in lock_spec(lock(model, KEY, length=8, **settings)).sites]


CASES: list[tuple[str, Any, list[str]]] = [
    ("late", "first", ["norm1"]),
    ("late", "all", ["norm1", "norm2"]),
    ("late", "norm2", ["norm2"]),
    ("late", "second", ["norm2"]),  # a layer stands for the norm right behind it
    ("late", ["norm2", "first"], ["norm1", "norm2"]),
    ("late", r"norm\d", ["norm1", "norm2"]),
    ("late", re.compile("norm[2-9]"), ["norm2"]),
    ("late", lambda n, m: isinstance(m, nn.BatchNorm2d) and m.num_features == 4, ["norm2"]),
    ("no norm", "first", ["0.inserted_norm"]),
    ("no norm", "all", ["0.inserted_norm", "2.inserted_norm"]),
    ("no norm", ["5"], ["5.inserted_norm"]),
    ("mlp", "all", ["1.inserted_norm"]),  # the last linear layer is the head
    ("mlp with norm", "first", ["1"]),
    ("batch", "3", ["3.inserted_norm"]),
    ("auxiliary head", "all", ["bn", "aux.1"]),
    ("two parents", "all", ["a.1"]),
    ("two parents", "b.1", ["a.1"]),
    ("root", "all", [""]),
    ("root", "", [""]),
    ("root layer", "first", ["inserted_norm"]),
    ("tokens", "all", ["layer.norm1", "layer.norm2"]),
    ("keyword arguments", "first", ["bn"]),
]


@pytest.mark.parametrize(
    "kind, layers, expected", CASES, ids=lambda v: getattr(v, "__name__", str(v)[:30])
)
def test_layers(kind: str, layers: Any, expected: list[str]) -> None:
    factory, example = SMALL[kind]
    if kind == "tokens":  # its first linear layer is read past by the fused path
        layers = r"layer\.norm\d"
    assert sites(factory(), layers=layers, example=example) == expected


@pytest.mark.parametrize(
    "kind, layers, expected",
    [
        ("late", "all", ["norm2", "norm1"]),  # registered, not executed
        ("no norm", "all", ["0.inserted_norm", "2.inserted_norm"]),
        ("late", r".*\d|first", ["norm2", "norm1"]),
        ("late", lambda n, m: True, ["norm2", "norm1"]),
        ("no norm", "2", ["2.inserted_norm"]),
    ],
)
def test_layers_without_an_example(kind: str, layers: Any, expected: list[str]) -> None:
    assert sites(SMALL[kind][0](), layers=layers) == expected


@pytest.mark.parametrize(
    "layers, message",
    [
        ("first", "takes an example"),
        ("second", "whether a norm stands right behind second"),
        (["second", "norm1"], "right behind second"),
    ],
)
def test_what_only_running_can_tell(layers: Any, message: str) -> None:
    with pytest.raises(LockError, match=message):
        lock(Late(), KEY, layers=layers)


@pytest.mark.parametrize(
    "layers, message",
    [
        ("norm3", "unknown layer 'norm3'. Did you mean 'norm1' or 'norm2'|'norm2' or 'norm1'"),
        (["norm1", "nrm2"], "unknown layer 'nrm2'. Did you mean 'norm2'"),
        (r"layer\d+\.", "nothing to lock for layers="),
        ("norm(", "neither a module's name nor a regular expression"),
        (lambda n, m: False, "nothing to lock"),
        ([], "nothing to lock"),
    ],
)
def test_requests_that_match_nothing(layers: Any, message: str) -> None:
    with pytest.raises(LockError, match=message):
        lock(Late(), KEY, layers=layers, example=IMAGE)


def test_a_container_is_refused_with_the_remedy() -> None:
    with pytest.raises(LockError, match=r"aux: no scale and shift.*name the layers"):
        lock(Aux(), KEY, layers="aux", example=IMAGE)


UNLOCKABLE: list[tuple[nn.Module, Any, str]] = [
    (nn.ReLU(), IMAGE, "it has no norm, convolution or linear layer"),
    (nn.Sequential(), IMAGE, "it has no norm, convolution or linear layer"),
    (nn.LSTM(4, 5), images(3, 2, 4), "recurrent"),
    (nn.GRU(4, 5), images(3, 2, 4), "recurrent"),
    (nn.RNN(4, 5), images(3, 2, 4), "recurrent"),
    (nn.LSTMCell(4, 5), images(3, 4), "recurrent"),
    (nn.MultiheadAttention(4, 2), (images(2, 3, 4),) * 3, "attention reads its weights"),
    (nn.Linear(4, 5), images(3, 4), "normalize the logits"),
    (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), IMAGE, "parametrized"),
]


@pytest.mark.parametrize("model, example, reason", UNLOCKABLE, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("traced", [True, False])
def test_nothing_lockable_says_why(
    model: nn.Module, example: Any, reason: str, traced: bool
) -> None:
    with pytest.raises(LockError, match=reason):
        lock(model, KEY, example=example if traced else None)
    assert not is_locked(model)


def test_a_norm_under_two_names_that_has_run_is_left_out_behind_a_module() -> None:
    model = CifarResNet(1, 10, 3)
    model.get_submodule("layer1.0").same = model.bn1
    names = sites(model, layers="all", behind="layer3", example=images(2, 3, 16, 16))
    assert {name.split(".")[0] for name in names} == {"layer3"}


def test_of_hundreds_of_names_the_nearest_and_the_first_are_listed() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(300)])
    with pytest.raises(LockError, match=r"unknown layer 'x299'.*'299'.* and 200 more\.$"):
        lock(model, KEY, layers="x299")


class Recurrent(nn.Module):
    """Words, a recurrent layer, a classifier: nothing that has a norm."""

    def __init__(self, words: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.words, self.layer, self.fc = words, layer, nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.fc(self.layer(self.words(ids))[0][:, -1])
        return out


def test_a_recurrent_network_is_told_to_lock_behind_its_words() -> None:
    model = Recurrent(nn.Embedding(9, 8), nn.GRU(8, 6, batch_first=True))
    ids = torch.randint(9, (4, 7), generator=derive(0, "ids"))
    with pytest.raises(LockError, match=r"GRU \(layer\): .*behind='words'") as caught:
        lock(model, KEY, scheme="pad", example=ids)
    assert "linear layer, fc, would normalize the logits" in str(caught.value)
    for scheme in ("pad", "channel"):
        locked = lock(model, KEY, scheme=scheme, behind="words", example=ids)
        assert "layer.weight_hh_l0" in shared_state(locked)
    for layers in ("first", "fc"):
        with pytest.raises(LockError, match=r"nothing is left to share.* behind=…"):
            lock(model, KEY, scheme="pad", layers=layers, example=ids)


def test_a_network_of_features_is_not_told_to_lock_behind_words() -> None:
    for net in (nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), nn.Sequential(nn.PReLU())):
        with pytest.raises(LockError, match="nothing to lock") as caught:
            lock(net, KEY, example=torch.zeros(2, 4))
        assert "behind=" not in str(caught.value)
