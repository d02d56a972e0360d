"""One torchvision model of each family; detection, segmentation and video models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedkl.key import Key
from fedkl.locking import (
    load_private_state,
    load_shared_state,
    lock,
    lock_like,
    lock_spec,
    merge,
    private_state,
    shared_state,
    sources_of,
    unlock,
)
from fedkl.locking.survey import call
from fedkl.rng import borrowed, derive

from .zoo import images

KEY = Key.generate()
# family -> (model, image side, locks with "all" (0: not counted), site of the first lock)
FAMILIES: dict[str, tuple[str, int, int, str]] = {
    "AlexNet": ("alexnet", 64, 5, "features.0.inserted_norm"),
    "ConvNeXt": ("convnext_tiny", 32, 23, "features.0.1"),
    "DenseNet": ("densenet121", 32, 121, "features.norm0"),
    "EfficientNet": ("efficientnet_b0", 64, 49, "features.0.1"),
    "GoogLeNet": ("googlenet", 64, 59, "conv1.bn"),
    "Inception": ("inception_v3", 299, 96, "Conv2d_1a_3x3.bn"),
    "MaxViT": ("maxvit", 64, 0, "stem.0.1"),
    "MNASNet": ("mnasnet0_5", 64, 52, "layers.1"),
    "MobileNetV2": ("mobilenet_v2", 64, 52, "features.0.1"),
    "MobileNetV3": ("mobilenet_v3_small", 64, 34, "features.0.1"),
    "RegNet": ("regnet_y_400mf", 64, 0, "stem.1"),
    "ResNet": ("resnet18", 64, 20, "bn1"),
    "ShuffleNetV2": ("shufflenet_v2_x0_5", 64, 56, "conv1.1"),
    "SqueezeNet": ("squeezenet1_1", 64, 26, "features.0.inserted_norm"),
    "Swin": ("swin_t", 32, 29, "features.0.2"),
    "VGG": ("vgg11", 32, 8, "features.0.inserted_norm"),
    "VGG with norm": ("vgg11_bn", 32, 8, "features.1"),
    "ViT": ("vit_b_32", 64, 26, "conv_proj.inserted_norm"),
}


def build(name: str, size: int, seed: int = 0) -> nn.Module:
    extra: dict[str, Any] = {"image_size": size} if name.startswith("vit") else {}
    if name in ("googlenet", "inception_v3"):
        extra = {"init_weights": False}
    with borrowed(derive(seed, name)):
        if name == "maxvit":  # the named one takes 224 pixels and nothing else
            model: nn.Module = tv.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.5, num_classes=5)
        else:
            model = tv.get_model(name, weights=None, num_classes=5, **extra)
        for p in model.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.02)
    return model


def run(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(call(model.eval(), example))


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    name, size, count, first = FAMILIES[family]
    x = images(2, 3, size, size)
    model = build(name, size)
    locked = lock(model, KEY, length=16, example=x)
    spec = lock_spec(locked)
    assert spec.sites[0].name == first
    assert count in (0, len(spec.sites))
    before, after = run(model, x), run(locked, x)
    assert not equal(before, after)
    assert equal(before, run(unlock(locked), x))
    torch.testing.assert_close(run(merge(locked), x), after, rtol=1e-4, atol=1e-4)

    out = tree_leaves(locked.train()(x))
    sum(t.square().mean() for t in out).backward()
    grads = [p.grad for s in sources_of(locked).values() for p in s.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)

    shared, private = shared_state(locked), private_state(locked)
    assert set(shared) | set(private) == set(locked.state_dict())
    assert not set(shared) & set(private)
    fresh = lock_like(build(name, size, seed=1), KEY, spec)
    load_shared_state(fresh, shared)
    load_private_state(fresh, private)
    assert equal(run(locked, x), run(fresh, x))


PICTURES = [images(3, 64, 64).abs().clamp(max=1) for _ in range(2)]
BOXES = torch.tensor([[4.0, 4.0, 14.0, 14.0], [8.0, 8.0, 40.0, 40.0], [0.0, 0.0, 62.0, 62.0]])
TARGETS = [{"boxes": BOXES, "labels": torch.tensor([1, 2, 1])} for _ in PICTURES]
BARE: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 3}
SMALLER = {"min_size": 64, "max_size": 64}
OTHERS: dict[str, tuple[Any, Any]] = {
    "Faster R-CNN": (
        lambda: tv.detection.fasterrcnn_mobilenet_v3_large_320_fpn(**BARE, **SMALLER),
        (PICTURES, TARGETS),
    ),
    "RetinaNet": (
        lambda: tv.detection.retinanet_resnet50_fpn(**BARE, **SMALLER),
        (PICTURES, TARGETS),
    ),
    "SSDlite": (
        lambda: tv.detection.ssdlite320_mobilenet_v3_large(**BARE),
        (PICTURES, TARGETS),
    ),
    "LR-ASPP": (
        lambda: tv.segmentation.lraspp_mobilenet_v3_large(**BARE),
        images(2, 3, 64, 64),
    ),
    "DeepLab": (
        lambda: tv.segmentation.deeplabv3_mobilenet_v3_large(**BARE, aux_loss=True),
        images(2, 3, 64, 64),
    ),
    "R3D": (lambda: tv.video.r3d_18(weights=None, num_classes=3), images(2, 3, 4, 16, 16)),
}


def trained(model: nn.Module, example: Any) -> list[Tensor]:
    """Outputs or losses in train mode, always with the same draws of dropout and anchors."""
    with borrowed(derive(0, "train")), torch.no_grad():
        return tree_leaves(call(copy.deepcopy(model).train(), example))


@pytest.mark.parametrize("layers", ["first", "all"])
@pytest.mark.parametrize("name", OTHERS)
def test_detection_segmentation_and_video(name: str, layers: str) -> None:
    factory, example = OTHERS[name]
    with borrowed(derive(0, name)):
        model = factory()
    if (name, layers) == ("SSDlite", "all"):
        # Whether every head is heard depends on the targets: its loss mines hard negatives.
        layers = r"backbone\.features\..*"
    locked = lock(model, KEY, length=8, layers=layers, example=example)
    assert (len(sources_of(locked)) == 1) is (layers == "first")
    seen = example[0] if isinstance(example, tuple) else example
    assert equal(run(model, seen), run(unlock(locked), seen))
    # Untrained detectors find nothing, with or without a lock: their losses tell.
    before, after, opened = (trained(m, example) for m in (model, locked, unlock(locked)))
    assert not equal(before, after)
    assert equal(before, opened)
    assert all(bool(t.isfinite().all()) for t in after)
