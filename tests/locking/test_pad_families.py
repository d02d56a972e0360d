"""One torchvision model of each family under a pad at every norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import convnext_tiny

from fedkl.errors import LockError
from fedkl.key import Key
from fedkl.locking import (
    load_private_state,
    load_shared_state,
    lock,
    lock_like,
    lock_spec,
    private_state,
    shared_state,
    sources_of,
    unlock,
)

from .test_families import FAMILIES, OTHERS, build, equal, run
from .zoo import images

KEY = Key.generate()
BIG = ("Inception", "VGG", "VGG with norm", "ConvNeXt")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow if f in BIG else ()) for f in FAMILIES]
)
def test_family(family: str) -> None:
    name, size, count, first = FAMILIES[family]
    x = images(2, 3, size, size)
    model = build(name, size)
    locked = lock(model, KEY, scheme="pad", head=True, example=x)
    spec = lock_spec(locked)
    assert spec.sites[0].name == first
    assert count in (0, len(spec.sites))
    assert all(len(site.shape) in (1, 2, 3) for site in spec.sites)
    before, after = run(model, x), run(locked, x)
    assert not equal(before, after)
    assert equal(before, run(unlock(locked), x))
    shared, private = shared_state(locked), private_state(locked)
    assert set(shared) | set(private) == set(locked.state_dict())
    assert not set(shared) & set(private)
    # First convolution and last linear layer, each with or without a bias.
    assert 2 <= len(spec.private) <= 4
    assert set(spec.private) <= set(private)
    fresh = lock_like(build(name, size, seed=1), KEY, spec)
    load_shared_state(fresh, shared)
    load_private_state(fresh, private)
    assert equal(after, run(fresh, x))


@pytest.mark.parametrize("name", ["LR-ASPP", "R3D"])
def test_segmentation_and_video(name: str) -> None:
    factory, example = OTHERS[name]
    model = factory()
    locked = lock(model, KEY, scheme="pad", example=example)
    stem = "stem.0" if name == "R3D" else "backbone.0.0"
    # The output of LR-ASPP is the sum of its two classifiers.
    heads = ["fc"] if name == "R3D" else [f"classifier.{n}_classifier" for n in ("low", "high")]
    private = {f"{stem}.weight"} | {f"{head}.{n}" for head in heads for n in ("weight", "bias")}
    assert set(lock_spec(locked).private) == private
    assert equal(run(model, example), run(unlock(locked), example))
    assert not equal(run(model, example), run(locked, example))


def test_detector_locks_where_every_image_has_one_size() -> None:
    factory, example = OTHERS["RetinaNet"]
    layers = r"backbone\.body\..*"
    locked = lock(factory(), KEY, scheme="pad", head=False, layers=layers, example=example)
    assert lock_spec(locked).private == ("backbone.body.conv1.weight",)
    with pytest.raises(LockError, match="one scale per position"):
        locked.eval()([torch.rand(3, 64, 128)])


class ChannelsFirst(nn.LayerNorm):
    """torchvision's LayerNorm2d, as in ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x.permute(0, 2, 3, 1))
        return x.permute(0, 3, 1, 2)


class ChannelsLast(nn.BatchNorm2d):
    """A batch norm whose channels come last, with an activation of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).relu()


class Unclear(nn.LayerNorm):
    """Every entry of γ tells everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + y.mean((1, 2, 3), keepdim=True)


def sided(norm: nn.Module) -> nn.Sequential:
    """Behind a norm of four channels, on a map of four by ``side`` - 2."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 4, 1), nn.Flatten(), nn.LazyLinear(3)
    )


@pytest.mark.parametrize("side", [6, 9])
@pytest.mark.parametrize("affine", [True, False])
def test_what_is_learned_per_channel_lies_along_the_channels(side: int, affine: bool) -> None:
    """Also as wide as there are channels, where the shapes alone do not tell."""
    x = images(4, 3, 6, side)
    net = sided(ChannelsFirst(4, elementwise_affine=affine))
    net(x)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    locked = lock(net, KEY, scheme="pad", example=x, learned="channel", layers="1")
    source = sources_of(locked)["1"]
    assert source.scale_learned.shape == (4, 1, 1)
    twin = lock_like(net, KEY, lock_spec(locked))
    assert sources_of(twin)["1"].scale_learned.shape == (4, 1, 1)
    assert all(torch.equal(t, before[n]) for n, t in unlock(locked).state_dict().items())


def test_where_the_channels_of_a_norm_lie_is_seen_or_asked() -> None:
    x = images(4, 6, 5, 3)
    layers = (nn.Linear(3, 4), ChannelsLast(4), nn.Linear(4, 4), nn.Flatten(), nn.Linear(120, 3))
    net = nn.Sequential(*layers)
    locked = lock(net, KEY, scheme="pad", example=x, learned="channel", layers="1")
    assert sources_of(locked)["1"].scale_learned.shape == (1, 1, 4)
    net[1] = Unclear(4)
    with pytest.raises(LockError, match=r"channels.*Unclear.*learned='position'"):
        lock(net, KEY, scheme="pad", example=x, learned="channel", layers="1")
    lock(net, KEY, scheme="pad", example=x, layers="1")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fedkl.errors.ShortcutWarning")
def test_convnext_learns_per_channel() -> None:
    net = convnext_tiny(num_classes=5)
    x = images(2, 3, 32, 32)
    locked = lock(net, KEY, scheme="pad", example=x, learned="channel")
    shapes = {n: tuple(s.scale_learned.shape) for n, s in sources_of(locked).items()}
    assert shapes["features.0.1"] == (96, 1, 1)  # LayerNorm2d
    assert shapes["features.1.0.block.2"] == (1, 1, 96)  # on channels that were turned to the end
    assert shapes["features.2.0"] == (96, 1, 1)
    assert locked.eval()(x).shape == (2, 5)
