"""Residual networks whose first lock can stand deep: models for `pad.py` and `breakpad.py`.

The shortcuts of :class:`fedkl.models.CifarResNet` go around every norm inside a block, so a pad
there hides nothing. Behind a whole stage nothing goes around.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from fedkl.models import CifarResNet

WIDTHS = {1: 16, 2: 32}


def resnet20_norm1(num_classes: int, channels: int) -> nn.Module:
    """ResNet-20 with a batch norm, ``between``, behind stage 1."""
    return _with_norm(1, num_classes, channels)


def resnet20_norm2(num_classes: int, channels: int) -> nn.Module:
    """The same with the norm behind stage 2."""
    return _with_norm(2, num_classes, channels)


def behind(stage: int) -> dict[str, Any]:
    """Settings of a run in which the norm behind ``stage``, and all after it, are locked.

    What lies before is private under a pad: its stem.
    """
    later = f"[{stage + 1}-3]"
    return {
        "model": {"name": f"deep:resnet20_norm{stage}"},
        "defense": {"layers": rf"between|layer{later}\..*bn\d"},
    }


def _with_norm(stage: int, num_classes: int, channels: int) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, layer in CifarResNet(3, num_classes, channels).named_children():
        layers[name] = layer
        if name == f"layer{stage}":
            layers["between"] = nn.BatchNorm2d(WIDTHS[stage])
    return nn.Sequential(layers)
