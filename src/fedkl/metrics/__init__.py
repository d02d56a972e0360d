"""Accuracy, intervals, and what a reconstruction has in common with the true image."""

from fedkl.metrics.classification import accuracy, count_correct
from fedkl.metrics.images import (
    align_affine,
    mse,
    paper_mse,
    paper_psnr,
    psnr,
    ssim,
    ssim_aligned,
    ssim_uniform,
)
from fedkl.metrics.intervals import advantage, mean_interval, paired_interval, proportion_interval
from fedkl.metrics.leakage import (
    best_matching,
    class_mean_floor,
    draw_decoys,
    identified,
    success,
)
from fedkl.metrics.perceptual import LPIPS_BACKBONES, NotAvailable, lpips

__all__ = [
    "LPIPS_BACKBONES",
    "NotAvailable",
    "accuracy",
    "advantage",
    "align_affine",
    "best_matching",
    "class_mean_floor",
    "count_correct",
    "draw_decoys",
    "identified",
    "lpips",
    "mean_interval",
    "mse",
    "paired_interval",
    "paper_mse",
    "paper_psnr",
    "proportion_interval",
    "psnr",
    "ssim",
    "ssim_aligned",
    "ssim_uniform",
    "success",
]
