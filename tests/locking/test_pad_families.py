"""One torchvision model of each family under a pad at every norm."""

from __future__ import annotations

import pytest
import torch

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
