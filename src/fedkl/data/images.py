"""Images kept as bytes (or as files) and turned into float batches on demand.

Fashion-MNIST as float32 3x32x32 would take 740 MB in each process; its bytes take 47 MB.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self, final

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fedkl.errors import ConfigError, DataError

_LUMA: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601
_CROP_PADDING: Final = 4


class Images(ABC):
    """N labeled images of one shape; ``labels`` is int64 (N,).

    A subset shares the pixels with the whole and differs only in which rows it looks at.
    """

    def __init__(self, labels: Tensor, channels: int, image_size: int) -> None:
        if channels not in (1, 3):
            raise ConfigError(f"channels is {channels}; images have 1 (grey) or 3 (color).")
        if image_size < 1:
            raise ConfigError(f"image_size is {image_size}; give a number of pixels, 1 or more.")
        self.labels = labels.to(torch.int64)
        self.image_shape = (channels, image_size, image_size)
        self._rows = torch.arange(len(labels))

    @final
    def __len__(self) -> int:
        return len(self.labels)

    @final
    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} images, {self.image_shape})"

    @final
    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images float32 (B, C, H, W) in [0, 1], contiguous, and labels int64 (B,).

        Args:
            index: int64 (B,), positions in [0, len(self)).

        Raises:
            IndexError: a position is out of range.
            DataError: an image file cannot be read.
        """
        return self._read(self._rows[index]), self.labels[index]

    @final
    def subset(self, index: Tensor) -> Self:
        """The images at ``index`` (int64 (M,)) in that order, without copying pixels."""
        view = copy.copy(self)
        view.labels, view._rows = self.labels[index], self._rows[index]
        return view

    @abstractmethod
    def _read(self, rows: Tensor) -> Tensor:
        """Float32 (B, C, H, W) in [0, 1], contiguous, of these rows of the whole."""


@final
class TensorImages(Images):
    """Images from a uint8 tensor.

    Grey becomes 3 equal channels, color becomes grey with the ITU-R 601 luma. An image that is
    smaller than ``image_size`` is padded with zeros on all sides; one that is larger, or less
    than half as large (padding would leave mostly black), is resized bilinearly with antialias.

    Args:
        pixels: uint8 (N, c, h, w), c of 1 or 3, at native size.
        labels: integers (N,).
        channels: 1 or 3, channels of a batch.
        image_size: height and width of a batch in pixels.

    Raises:
        ConfigError: ``channels`` or ``image_size`` is out of range.
        DataError: dtype, shape or number of labels is not as above.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, *, channels: int = 3, image_size: int = 32
    ) -> None:
        super().__init__(labels, channels, image_size)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise DataError(
                f"got pixels {pixels.dtype} {tuple(pixels.shape)}; "
                "expected torch.uint8 (N, 1 or 3, h, w)."
            )
        if labels.shape != pixels.shape[:1]:
            raise DataError(f"got {len(pixels)} images and labels {tuple(labels.shape)}.")
        self._pixels = pixels

    def _read(self, rows: Tensor) -> Tensor:
        channels, size, _ = self.image_shape
        x = self._pixels[rows].to(torch.float32).div_(255)
        if channels == 1 and x.shape[1] == 3:
            luma = x.new_tensor(_LUMA).view(1, 3, 1, 1)
            x = (x * luma).sum(dim=1, keepdim=True).clamp_(0, 1)
        height, width = x.shape[2:]
        if height == width == size:
            return x.expand(-1, channels, -1, -1).contiguous()
        if max(height, width) <= size <= 2 * min(height, width):
            # Writing the center once is cheaper than F.pad followed by a copy per channel.
            out = x.new_zeros(len(x), channels, size, size)
            top, left = (size - height) // 2, (size - width) // 2
            out[:, :, top : top + height, left : left + width] = x
            return out
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True).clamp_(0, 1)
        return x.expand(-1, channels, -1, -1).contiguous()


@final
class FolderImages(Images):
    """Images read from files when they are asked for.

    The shorter side is resized to ``image_size`` (bilinear, antialias), the center cut out, pixel
    for pixel as ``Resize`` and ``CenterCrop`` of torchvision do. Grey of 16 bits is scaled to 8.

    Args:
        samples: path and label of each image, as ``torchvision.datasets.ImageFolder.samples``.
        channels: 1 (ITU-R 601 luma) or 3.
        image_size: height and width of a batch in pixels.

    Raises:
        ConfigError: ``channels`` or ``image_size`` is out of range.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str | Path, int]],
        *,
        channels: int = 3,
        image_size: int = 32,
    ) -> None:
        labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
        super().__init__(labels, channels, image_size)
        # A NumPy array of strings is one block; forked workers do not copy it by refcounting.
        self._paths = np.array([str(path) for path, _ in samples])

    def _read(self, rows: Tensor) -> Tensor:
        out = torch.empty(len(rows), *self.image_shape)
        for slot, row in enumerate(rows.tolist()):
            out[slot] = self._open(Path(str(self._paths[row])))
        return out.div_(255)

    def _open(self, path: Path) -> Tensor:
        """Pixels in 0..255, uint8 (C, H, W)."""
        channels, size, _ = self.image_shape
        try:
            with Image.open(path) as file:
                image = _of_8_bits(file).convert("L" if channels == 1 else "RGB")
        # Pillow raises all four; the last is of images too large to be honest.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"image {path} cannot be read ({error}). Mend the file or take it out."
            ) from error
        shorter = min(image.size)
        width, height = (int(size * side / shorter) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
        return torch.from_numpy(np.array(image)).view(size, size, channels).permute(2, 0, 1)


def _of_8_bits(image: Image.Image) -> Image.Image:
    """``image`` with 16 bits scaled to 8; Pillow's ``convert`` would cut all above 255 off.

    Raises:
        ValueError: its values have no range that anybody knows.
    """
    # Pillow before 10.3 opens grey PNG of 16 bits in 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        wide = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.rint(wide / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode}), whose black and white no file "
            "states; save it with 8 or 16 bits"
        )
    return image


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random crop after zero padding by 4 pixels, then a horizontal flip of every other image.

    The augmentation of He et al. 2016, section 4.2, drawn anew for each image.

    Args:
        x: images (B, C, H, W).
        generator: CPU generator of the offsets and flips.

    Returns:
        A new tensor of the shape, dtype and device of ``x``.
    """
    count, _, height, width = x.shape
    shifts = torch.randint(2 * _CROP_PADDING + 1, (2, count), generator=generator).to(x.device)
    flips = (torch.rand(count, generator=generator) < 0.5).to(x.device)
    padded = F.pad(x, (_CROP_PADDING,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (B, C, 9, 9, H, W)
    crops = windows[torch.arange(count, device=x.device), :, shifts[0], shifts[1]]
    return torch.where(flips.view(-1, 1, 1, 1), crops.flip(3), crops)
