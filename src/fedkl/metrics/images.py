"""Distance and likeness of images, one value per image.

Images are float (N, C, H, W) in [0, 1]; values are float64 (N,), never averaged over images.
Everything is computed in float64: the variances of SSIM are small differences of large numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fedkl.errors import DataError

_WINDOW = 7  # of scikit-image's uniform SSIM
_GAUSSIAN_RADIUS = 5  # of 11 x 11 at sigma 1.5
_C1, _C2 = 0.01**2, 0.03**2  # Wang et al. 2004 with data range 1
_PEAK = 255.0


def check_tensor(name: str, value: object) -> None:
    """Refuse an array of numpy, a list and whatever else is no tensor.

    Raises:
        DataError: that.
    """
    if not isinstance(value, Tensor):
        raise DataError(
            f"got {name} as {type(value).__name__}; expected a torch.Tensor (torch.as_tensor makes "
            "one of an array or a list)."
        )


def check_images(name: str, images: Tensor, *, bounded: bool = True) -> None:
    """Refuse what is not a float batch (N, C, H, W) with N, C, H, W > 0 and finite values.

    Raises:
        DataError: that, or with ``bounded`` a value outside [0, 1].
    """
    check_tensor(name, images)
    if images.ndim != 4 or images.numel() == 0 or not images.is_floating_point():
        raise DataError(
            f"got {name} {tuple(images.shape)} of {images.dtype}; expected a float tensor "
            "(N, C, H, W) that is not empty (divide 8-bit images by 255)."
        )
    low, high = (float(value) for value in images.detach().aminmax())
    if not (-torch.inf < low and high < torch.inf):
        raise DataError(f"got {name} with values that are not finite; leave those images out.")
    if bounded and not (low >= 0 and high <= 1):
        raise DataError(
            f"got {name} with values from {low:.4g} to {high:.4g}; expected [0, 1]. "
            "Clamp a reconstruction before measuring it."
        )


def check_pair(x: Tensor, target: Tensor, *, bounded: bool = True) -> tuple[Tensor, Tensor]:
    """Both batches in float64, without a graph; only the target is held to [0, 1] if not bounded.

    Raises:
        DataError: one of them is not a batch of images, or their shapes differ.
    """
    check_images("images", x, bounded=bounded)
    check_images("targets", target)
    if x.shape != target.shape:
        raise DataError(
            f"got images {tuple(x.shape)} and targets {tuple(target.shape)}; "
            "expected one target per image, of the same shape."
        )
    return x.detach().double(), target.detach().double()


def check_size(images: Tensor, least: int, metric: str) -> None:
    """Refuse images (N, C, H, W) with fewer than ``least`` pixels in height or width.

    Raises:
        DataError: they are too small for ``metric``.
    """
    if min(images.shape[2:]) < least:
        height, width = images.shape[2:]
        raise DataError(
            f"got images of {height}x{width}; {metric} needs {least}x{least} pixels or more."
        )


def mse(x: Tensor, target: Tensor) -> Tensor:
    """Mean squared error in [0, 1] of every image (N,) over its channels and pixels.

    Raises:
        DataError: not two float batches (N, C, H, W) in [0, 1] of one shape.
    """
    x, target = check_pair(x, target)
    return (x - target).square().mean(dim=(1, 2, 3))


def psnr(x: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(1 / MSE), of every image (N,); inf when equal.

    Raises:
        DataError: see :func:`mse`.
    """
    return -10 * torch.log10(mse(x, target))


def paper_mse(x: Tensor, target: Tensor) -> Tensor:
    """What the key-lock paper prints as MSE: the *root* of the MSE on the scale 0 … 255, (N,).

    Ren et al., arXiv 2305.04095, table of leakage, as its released code computes it; only for
    comparison with those figures. Images are not rounded to 8 bits.

    Raises:
        DataError: see :func:`mse`.
    """
    return _PEAK * mse(x, target).sqrt()


def paper_psnr(x: Tensor, target: Tensor) -> Tensor:
    """What the key-lock paper prints as PSNR: 10 log10(255² / RMSE), (N,); inf when equal.

    RMSE is :func:`paper_mse`. The textbook has its square there, so these figures are *not* dB of
    anything: a true 28.1 dB reads 38.1.

    Raises:
        DataError: see :func:`mse`.
    """
    return 10 * torch.log10(_PEAK**2 / paper_mse(x, target))


def ssim(x: Tensor, target: Tensor) -> Tensor:
    """Structural similarity in [-1, 1] of every image (N,), 1 when equal.

    Wang et al. 2004 with a Gaussian window (11 x 11, sigma 1.5), data range 1, mirrored borders,
    mean over channels and all pixels, by torchmetrics.

    Raises:
        DataError: see :func:`mse`; or the images are smaller than 6 x 6.
    """
    return _gaussian_ssim(*check_pair(x, target))


def _gaussian_ssim(x: Tensor, target: Tensor) -> Tensor:
    """:func:`ssim` of float64 batches whose values may lie outside [0, 1]."""
    # Takes as long to import as torch itself; training, which needs accuracy only, never waits.
    from torchmetrics.functional.image import structural_similarity_index_measure as similarity

    check_size(x, _GAUSSIAN_RADIUS + 1, "ssim")
    value = similarity(x, target, gaussian_kernel=True, sigma=1.5, reduction="none", data_range=1.0)
    assert isinstance(value, Tensor)  # a tuple only if the full image is asked for
    return value


def ssim_uniform(x: Tensor, target: Tensor) -> Tensor:
    """Structural similarity in [-1, 1] with a uniform 7 x 7 window, of every image (N,).

    The convention of ``skimage.metrics.structural_similarity`` (and of the key-lock paper's
    figures): sample covariances, windows inside the image only, mean over windows and channels.
    It gives higher floors than :func:`ssim`.

    Raises:
        DataError: see :func:`mse`; or the images are smaller than 7 x 7.
    """
    x, target = check_pair(x, target)
    check_size(x, _WINDOW, "ssim_uniform")
    pixels = _WINDOW**2
    sample = pixels / (pixels - 1)
    mean_x, mean_t = avg_pool2d(x, _WINDOW, 1), avg_pool2d(target, _WINDOW, 1)
    var_x = sample * (avg_pool2d(x * x, _WINDOW, 1) - mean_x * mean_x)
    var_t = sample * (avg_pool2d(target * target, _WINDOW, 1) - mean_t * mean_t)
    cov = sample * (avg_pool2d(x * target, _WINDOW, 1) - mean_x * mean_t)
    luminance = (2 * mean_x * mean_t + _C1) / (mean_x.square() + mean_t.square() + _C1)
    structure = (2 * cov + _C2) / (var_x + var_t + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def align_affine(x: Tensor, target: Tensor) -> Tensor:
    """``x`` (N, C, H, W) with the brightness and contrast of ``target``, in the dtype of ``x``.

    Every channel of every image becomes ``slope * x + offset``, the least-squares fit to the
    target with slope >= 0: a batch norm hides mean and scale but not the sign. A channel that is
    constant, or falls where the target rises, becomes the target's mean. Values may leave [0, 1],
    in ``x`` as in the result. This looks at the truth: align the floor alike.

    Raises:
        DataError: not two float batches (N, C, H, W) of one shape, ``x`` finite and ``target`` in
            [0, 1].
    """
    return _aligned(*check_pair(x, target, bounded=False)).to(x.dtype)


def _aligned(x: Tensor, target: Tensor) -> Tensor:
    centered = x - x.mean(dim=(2, 3), keepdim=True)
    # Unit height first, so that the square of a faint image does not underflow to a flat one.
    height = centered.abs().amax(dim=(2, 3), keepdim=True)
    unit = centered / torch.where(height > 0, height, 1.0)
    mean = target.mean(dim=(2, 3), keepdim=True)
    cov = (unit * (target - mean)).mean(dim=(2, 3), keepdim=True)
    variance = unit.square().mean(dim=(2, 3), keepdim=True)
    slope = (cov / torch.where(variance > 0, variance, 1.0)).clamp(min=0)
    return slope * unit + mean


def ssim_aligned(x: Tensor, target: Tensor) -> Tensor:
    """:func:`ssim` in [-1, 1] of ``align_affine(x, target)`` and ``target``, of every image (N,).

    Aligned values outside [0, 1] are not clipped, so the result is the same for ``a * x + b`` with
    every a > 0. Even an empty image gets the target's mean: compare with the floor's value.

    Raises:
        DataError: see :func:`align_affine`; or the images are smaller than 6 x 6.
    """
    x, target = check_pair(x, target, bounded=False)
    return _gaussian_ssim(_aligned(x, target), target)
