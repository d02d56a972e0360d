"""A first lock behind any module: what stands there, what is private, and what cannot be."""

from __future__ import annotations

import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer, get_model

from fedkl.errors import LockError, ShortcutWarning
from fedkl.key import Key
from fedkl.locking import (
    LockSpec,
    lock,
    lock_like,
    lock_spec,
    merge,
    private_state,
    renew,
    shared_state,
    unlock,
)
from fedkl.locking.rebuild import rebuild
from fedkl.models import CifarResNet
from fedkl.rng import derive

KEY = Key.generate()
IMAGES = torch.rand(4, 3, 16, 16, generator=derive(0, "x"))
TOKENS = torch.randint(5, (4, 6), generator=derive(0, "tokens"))
SCHEMES = ("norm", "fedbn", "channel", "open-pad", "pad")


class Text(nn.Module):
    """A pre-norm transformer over token ids, whose residual stream goes around every norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.blocks = nn.Sequential(*[self._block() for _ in range(2)])
        self.fc = nn.Linear(8, 3)

    def _block(self) -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.fc(self.blocks(self.embed(ids)).mean(dim=1))
        return out


class Waves(nn.Module):
    """One axis of positions, and a block without parameters behind the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.act(self.conv(x)).mean(-1))
        return out


def _resnet() -> nn.Module:
    return CifarResNet(1, 10, 3)


def _vit() -> nn.Module:
    return VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5)


def _mobilenet() -> nn.Module:
    return get_model("mobilenet_v3_small", weights=None, num_classes=5)


def _swin() -> nn.Module:
    return get_model("swin_t", weights=None, num_classes=5)


# model, example, module, norm that stands there, shape of a pad there
Case = tuple[Callable[[], nn.Module], Tensor, str, str, tuple[int, ...]]
CASES: dict[str, Case] = {
    "a stage": (_resnet, IMAGES, "layer2", "BatchNorm2d", (32, 8, 8)),
    "a block": (_resnet, IMAGES, "layer1.0", "BatchNorm2d", (16, 16, 16)),
    "a layer with a norm behind": (_resnet, IMAGES, "conv1", "BatchNorm2d", (16, 16, 16)),
    "an encoder block": (
        _vit, IMAGES, "encoder.layers.encoder_layer_0", "BatchNorm1d", (5, 16)
    ),
    "a sequence of blocks of tokens": (Text, TOKENS, "blocks", "BatchNorm1d", (6, 8)),
    "an embedding": (Text, TOKENS, "embed", "BatchNorm1d", (6, 8)),
    "no parameters": (Waves, torch.rand(4, 2, 9), "act", "BatchNorm1d", (6, 7)),
    "features of an inverted residual": (
        _mobilenet, torch.rand(4, 3, 32, 32), "features.3", "BatchNorm2d", (24, 4, 4)
    ),
    "channels last": (_swin, torch.rand(2, 3, 32, 32), "features.1", "BatchNorm1d", (8, 8, 96)),
}  # fmt: skip


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_first_lock_stands_behind_the_module(case: Case, scheme: str) -> None:
    make, example, behind, norm, shape = case
    key = KEY if scheme in ("channel", "pad") else None
    plain = make()
    settings = {"length": 8} if scheme == "channel" else {}
    locked = lock(plain, key, scheme=scheme, behind=behind, example=example, **settings)
    site = lock_spec(locked).sites[0]
    assert (site.name, site.norm, site.inserted) == (f"{behind}.inserted_norm", norm, True)
    features = shape[-1] if site.rows else shape[0]
    assert site.shape == (shape if "pad" in scheme else (features,))
    unlocked = unlock(locked).eval()
    with torch.no_grad():
        assert torch.equal(unlocked(example), plain.eval()(example))


def test_what_comes_before_is_private_and_has_no_lock(case: Case) -> None:
    make, example, behind, _, _ = case
    locked = lock(make(), KEY, scheme="pad", behind=behind, example=example)
    module = locked.get_submodule(behind)
    own = {f"{behind}.{n}" for n, _ in module.named_parameters()}
    assert not own & shared_state(locked).keys()
    assert shared_state(locked)


def test_all_of_the_stages_before_is_private() -> None:
    locked = lock(_resnet(), KEY, scheme="pad", behind="layer2", example=IMAGES)
    assert {n.split(".")[0] for n in shared_state(locked)} == {"layer3"}
    private = {n.split(".")[0] for n in lock_spec(locked).private}
    assert private == {"conv1", "bn1", "layer1", "layer2", "fc"}
    norms = lock(_resnet(), None, scheme="fedbn", behind="layer2", example=IMAGES)
    assert "layer2.0.bn1.weight" in shared_state(norms)
    assert "layer3.0.bn1.weight" not in shared_state(norms)


def test_with_first_nothing_else_is_locked(case: Case) -> None:
    make, example, behind, _, _ = case
    locked = lock(make(), KEY, scheme="pad", layers="first", behind=behind, example=example)
    assert [s.name for s in lock_spec(locked).sites] == [f"{behind}.inserted_norm"]


def test_a_spec_makes_the_same_lock_again(case: Case) -> None:
    make, example, behind, _, _ = case
    plain = make()
    locked = lock(plain, KEY, scheme="pad", behind=behind, example=example)
    spec = LockSpec.from_dict(lock_spec(locked).to_dict())
    again = lock_like(plain, KEY, spec)
    with torch.no_grad():
        assert torch.equal(again.eval()(example), locked.eval()(example))
        rebuild(plain, spec)(example)


@pytest.mark.parametrize("case", ["a stage", "an encoder block"], indirect=True)
def test_merging_computes_the_same(case: Case) -> None:
    make, example, behind, _, _ = case
    locked = lock(make(), KEY, behind=behind, example=example, length=8).eval()
    with torch.no_grad():
        assert torch.allclose(merge(locked)(example), locked(example), atol=1e-6)


@pytest.mark.parametrize("behind", ["layers.0", "layers.1"])
def test_merged_blocks_take_and_show_what_they_did(behind: str) -> None:
    """The encoder gives its blocks masks by keyword, and looks into the first one."""
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.rand(4, 6, 8)
    locked = lock(nn.TransformerEncoder(block, 2), KEY, behind=behind, example=x, length=8).eval()
    merged = pickle.loads(pickle.dumps(merge(locked)))
    assert torch.allclose(merged(x), locked(x), atol=1e-6)


def test_the_norm_itself_is_taken_if_the_module_is_one() -> None:
    locked = lock(_resnet(), KEY, scheme="pad", behind="bn1", example=IMAGES)
    plain = lock(_resnet(), KEY, scheme="pad", example=IMAGES)
    assert lock_spec(locked).sites == lock_spec(plain).sites


def test_computes_what_a_norm_of_ones_own_computes() -> None:
    """Against the same network with the norm written into it and named in ``layers``."""
    plain = _resnet()
    layers = OrderedDict[str, nn.Module]()
    for name, layer in plain.named_children():
        layers[name] = layer
        if name == "layer2":
            layers["between"] = nn.BatchNorm2d(32)
    written = nn.Sequential(layers)
    for scheme in ("fedbn", "open-pad"):
        ours = lock(plain, None, scheme=scheme, behind="layer2", example=IMAGES)
        theirs = lock(
            written, None, scheme=scheme, layers=r"between|layer3\..*bn\d", example=IMAGES
        )
        assert torch.equal(ours(IMAGES), theirs(IMAGES))
        renamed = {n.replace("between", "layer2.inserted_norm") for n in private_state(theirs)}
        assert private_state(ours).keys() == renamed


def test_shared_gradients_do_not_see_the_image_but_through_the_lock() -> None:
    """For a pad that undoes what another image changes, every shared gradient is the same."""
    model = lock(
        Text(), KEY, scheme="pad", behind="embed", layers="first", example=TOKENS, head=False
    ).eval()
    shared = set(shared_state(model))
    other = TOKENS.roll(1, 1)
    first = _gradients(model, TOKENS[:1], shared)
    source = model.get_submodule("embed.inserted_norm.keylock")
    with torch.no_grad():
        norm = model.get_submodule("embed.inserted_norm")
        was, now = (_normalized(model, norm, ids[:1]) for ids in (TOKENS, other))
        assert not torch.allclose(was, now)
        move = source.scale() * (was - now)
        source.shift_learned += move / source.gain  # type: ignore[operator]
    second = _gradients(model, other[:1], shared)
    assert first.keys() == second.keys()
    assert len(first) > 10
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-5), name


def _normalized(model: nn.Module, norm: nn.Module, ids: Tensor) -> Tensor:
    embedded: Tensor = F.embedding(ids, model.embed.weight)  # type: ignore[arg-type]
    flat = norm(embedded.reshape(-1, 8))
    out: Tensor = flat.reshape(6, 8)
    return out


def _gradients(model: nn.Module, ids: Tensor, names: set[str]) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model(ids), torch.tensor([1])).backward()
    return {n: p.grad for n, p in model.named_parameters() if n in names and p.grad is not None}


def test_it_ends_the_warning_of_shortcuts() -> None:
    with pytest.warns(ShortcutWarning, match="Lock where all ways meet .behind='embed'"):
        lock(Text(), KEY, scheme="pad", example=TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lock(Text(), KEY, scheme="pad", behind="embed", example=TOKENS)


def test_pads_there_are_renewed_and_stay_short_for_short_sequences() -> None:
    model = lock(Text(), KEY, scheme="pad", behind="embed", example=TOKENS, max_length=9).eval()
    assert lock_spec(model).sites[0].shape == (9, 8)
    before = model(TOKENS)
    renew(model, KEY, epoch=1)
    assert not torch.allclose(before, model(TOKENS))
    assert model(TOKENS[:, :3]).shape == (4, 3)


def test_what_is_learned_per_channel_lies_along_the_channels() -> None:
    """Also where an image is as wide as it has channels: 16 of 16×16 behind the first layer."""
    locked = lock(_resnet(), KEY, scheme="pad", example=IMAGES, learned="channel")
    learned = locked.get_submodule("bn1.keylock").scale_learned
    assert isinstance(learned, Tensor)
    assert learned.shape == (16, 1, 1)


class Pair(nn.Module):
    """Puts out two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Greedy(nn.Module):
    """Goes over whatever children it has."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class Last(nn.Sequential):
    """Looks at the last of its children."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self[0](x) * self[-1].weight.abs().mean()
        return out


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = Last(nn.Conv2d(3, 3, 1))
        self.greedy, self.pair, self.unused = Greedy(), Pair(), nn.Sequential(nn.Conv2d(3, 3, 1))
        self.scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
        self.twice, self.list = nn.ReLU(), nn.ModuleList([nn.Conv2d(3, 4, 3)])
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.pair(self.twice(self.scripted(self.greedy(self.last(x)))))
        x = self.twice(self.list[0](x))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize(
    ("behind", "message"),
    [
        ("greedy", "goes over its children by itself"),
        ("last", "goes over its children by itself"),
        ("pair", "puts out tuple"),
        ("unused", "not called on this example"),
        ("list", "not called on this example"),
        ("scripted", "scripted"),
        ("twice", "run at two sizes"),
        ("gready", "unknown module 'gready'. Did you mean 'greedy'"),
        ("", "unknown module ''"),
        (3, "must be a module's name, got int"),
    ],
)
def test_where_none_can_stand(behind: Any, message: str) -> None:
    model = Odd()
    with pytest.raises(LockError, match=message):
        lock(model, KEY, scheme="pad", behind=behind, example=IMAGES, inplace=True)
    assert not [n for n, _ in model.named_modules() if "inserted_norm" in n]


def test_takes_an_example() -> None:
    with pytest.raises(LockError, match="example=one input batch"):
        lock(_resnet(), KEY, behind="layer2")


def test_layers_that_all_run_before_are_refused() -> None:
    with pytest.raises(LockError, match=r"runs behind layer2, but layer1\.0\.bn1 before"):
        lock(_resnet(), KEY, behind="layer2", layers="layer1.0.bn1", example=IMAGES)
    locked = lock(
        _resnet(), KEY, behind="layer2", layers=r"layer[13]\.0\.bn1", example=IMAGES, length=8
    )
    assert [s.name for s in lock_spec(locked).sites] == ["layer2.inserted_norm", "layer3.0.bn1"]


def test_nothing_tells_the_features_of_a_layer_of_ones_own() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    model = nn.Sequential(Own(), nn.Linear(8, 8), nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(LockError, match=r"cannot lock behind 0: nothing tells"):
        lock(model, KEY, scheme="pad", behind="0", example=torch.rand(4, 6, 8))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("scheme", ["channel", "pad"])
def test_scripted_layers_beside_a_lock_stay_as_they_are(scheme: str) -> None:
    scripted = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Flatten()))
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), scripted, nn.Linear(784, 5), nn.Linear(5, 2)
    )
    locked = lock(model, KEY, scheme=scheme, layers="1", example=IMAGES)
    assert locked(IMAGES).shape == (4, 2)
    assert "3.weight" in shared_state(locked)


def test_a_model_that_cannot_be_copied_gets_the_warning_all_the_same() -> None:
    model = Text()
    model.handle = (n for n in "generators cannot be copied")  # type: ignore[assignment]
    with pytest.warns(ShortcutWarning, match="behind=…, a module that all of them pass") as seen:
        lock(model, KEY, scheme="pad", example=TOKENS, inplace=True)
    assert seen[0].filename == __file__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "BatchNorm9d"}, "of 9 axes at layer2.inserted_norm"),
        ({"rows": True}, "kind or size of layer2.inserted_norm"),
        ({"name": "layer9.inserted_norm"}, "names layer9, which this model lacks"),
        ({"name": "layer2.0", "inserted": False}, "no scale and shift"),
    ],
)
def test_a_spec_that_was_tampered_with_is_refused(change: dict[str, Any], message: str) -> None:
    spec = lock_spec(lock(_resnet(), KEY, scheme="pad", behind="layer2", example=IMAGES))
    site = replace(spec.sites[0], **change)
    with pytest.raises(LockError, match=message):
        lock_like(_resnet(), KEY, replace(spec, sites=(site, *spec.sites[1:])))
