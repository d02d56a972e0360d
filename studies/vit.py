"""A vision transformer small enough for a CPU: a model for `leakage.py`."""

from __future__ import annotations

from torch import nn
from torchvision.models import VisionTransformer


def tiny(num_classes: int, channels: int, image_size: int) -> nn.Module:
    """Patches of 4×4, width 64, 3 blocks of 4 heads (Dosovitskiy et al. 2021, scaled down)."""
    model = VisionTransformer(image_size, 4, 3, 4, 64, 128, num_classes=num_classes)
    model.conv_proj = nn.Conv2d(channels, 64, 4, 4)
    return model
