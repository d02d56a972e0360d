"""A small audit on digits."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from fedkl.audit import AuditConfig
from fedkl.federation import RunConfig, config_from


def all_convolutional(num_classes: int, channels: int) -> nn.Module:
    """A model whose classifier is a convolution: ``audithelp:all_convolutional``."""
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, stride=2, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(6, num_classes, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def small_run(**defense: Any) -> RunConfig:
    return config_from(
        {
            "data": {"dataset": "digits", "image_size": 16, "channels": 1, "samples": 60},
            "federation": {"rounds": 1, "clients": 2, "join_steps": 1},
            "training": {"batch_size": 16, "local_steps": 2},
            "evaluation": {"every": 0, "images": 20, "wrong_keys": 1, "wrong_key_images": 20,
                           "thief_images": 20, "calibration_images": 20},
            "defense": defense,
        }
    )  # fmt: skip


def small_run_with(optimizer: str) -> RunConfig:
    run = small_run()
    return dataclasses.replace(run, training=dataclasses.replace(run.training, optimizer=optimizer))


def centralized() -> RunConfig:
    run = small_run()
    return dataclasses.replace(
        run, federation=dataclasses.replace(run.federation, method="centralized")
    )


def small_audit(**settings: Any) -> AuditConfig:
    values: dict[str, Any] = {
        "run": small_run(),
        "defenses": ("channel",),
        "attacks": ("inverting-gradients",),
        "images": 2,
        "effort": "quick",
        "candidates": 10,
        "pictured": 1,
    }
    return AuditConfig(**{**values, **settings})
