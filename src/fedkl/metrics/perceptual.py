"""LPIPS, where the backbones it needs are already on this machine; nothing is ever downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fedkl.errors import DataError, unknown
from fedkl.metrics.images import check_pair, check_size
from fedkl.rng import borrowed, derive

# Name in torchmetrics -> weights in torchvision, and the smallest side its layers can take.
LPIPS_BACKBONES = {
    "alex": ("AlexNet_Weights", 31),
    "squeeze": ("SqueezeNet1_1_Weights", 17),
    "vgg": ("VGG16_Weights", 16),
}


@dataclass(frozen=True)
class NotAvailable:
    """In place of a value that this machine cannot compute; ``str()`` of it says why."""

    reason: str

    def __str__(self) -> str:
        return f"not available: {self.reason}"


def lpips(x: Tensor, target: Tensor, backbone: str = "alex") -> Tensor | NotAvailable:
    """Perceptual distance >= 0 (less is more alike) of every image (N,), or why there is none.

    Zhang et al. 2018, by torchmetrics; ``alex`` and ``vgg`` are LPIPS-A and LPIPS-V of the
    key-lock paper. ``x`` and ``target`` are (N, 3, H, W) or gray (N, 1, H, W) in [0, 1]. The
    backbone's weights must lie in ``torch.hub.get_dir()/checkpoints``.

    Raises:
        DataError: see :func:`fedkl.metrics.mse`; an unknown backbone, another number of channels,
            images too small for it, or a weight file that cannot be read.
    """
    if backbone not in LPIPS_BACKBONES:
        raise DataError(unknown("LPIPS backbone", backbone, LPIPS_BACKBONES))
    x, target = check_pair(x, target)
    if x.shape[1] not in (1, 3):
        raise DataError(f"got {x.shape[1]} channels; LPIPS takes images of 1 or 3.")
    check_size(x, LPIPS_BACKBONES[backbone][1], f"LPIPS with {backbone}")
    weights = _weight_file(backbone)
    if not weights.is_file():
        return NotAvailable(
            f"LPIPS with {backbone} needs the file {weights.name} in {weights.parent}; "
            "torchvision's pages say where to get it."
        )
    distance = _distance(backbone, weights)
    color = (-1, 3, -1, -1)
    with torch.no_grad():
        value = distance(x.float().cpu().expand(color), target.float().cpu().expand(color))
    return value.double().reshape(-1).to(x.device)


def _weight_file(backbone: str) -> Path:
    """Where torchvision looks for the weights before it would download them."""
    import torchvision

    url = getattr(torchvision.models, LPIPS_BACKBONES[backbone][0]).DEFAULT.url
    return Path(torch.hub.get_dir()) / "checkpoints" / str(url).rpartition("/")[2]


@lru_cache(maxsize=2)
def _distance(backbone: str, weights: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """The network, read once: VGG's file has half a gigabyte."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        # Building a network draws initial weights, which must not move anyone's randomness.
        with borrowed(derive(0, "lpips", backbone)):
            metric = LearnedPerceptualImagePatchSimilarity(
                backbone,  # type: ignore[arg-type]
                normalize=True,
            )
    except Exception as error:  # a damaged file raises whatever its first wrong byte leads to
        raise DataError(
            f"got a weight file {weights} that cannot be read ({error}); get it anew, or remove it "
            "to go without LPIPS."
        ) from error
    network = metric.net
    return lambda x, target: network(x, target, normalize=True)
