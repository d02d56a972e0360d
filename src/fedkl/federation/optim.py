"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedkl.federation.config import TrainingConfig

Optimizer = torch.optim.Optimizer


def _sgd(params: Iterable[nn.Parameter], lr: float, config: TrainingConfig) -> Optimizer:
    return torch.optim.SGD(
        params,
        lr=lr,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def _adam(params: Iterable[nn.Parameter], lr: float, config: TrainingConfig) -> Optimizer:
    return torch.optim.Adam(params, lr=lr, weight_decay=config.weight_decay)


def _rmsprop(params: Iterable[nn.Parameter], lr: float, config: TrainingConfig) -> Optimizer:
    return torch.optim.RMSprop(
        params, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay
    )


def _adadelta(params: Iterable[nn.Parameter], lr: float, config: TrainingConfig) -> Optimizer:
    return torch.optim.Adadelta(params, lr=lr, weight_decay=config.weight_decay)


OPTIMIZERS: Final[
    Mapping[str, Callable[[Iterable[nn.Parameter], float, TrainingConfig], Optimizer]]
] = {"sgd": _sgd, "adam": _adam, "rmsprop": _rmsprop, "adadelta": _adadelta}


def _constant(config: TrainingConfig, round_: int, rounds: int) -> float:
    return 1.0


def _step(config: TrainingConfig, round_: int, rounds: int) -> float:
    return config.decay ** sum(round_ > milestone for milestone in config.milestones)


def _cosine(config: TrainingConfig, round_: int, rounds: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (round_ - 1) / rounds))


SCHEDULES: Final[Mapping[str, Callable[[TrainingConfig, int, int], float]]] = {
    "constant": _constant,
    "step": _step,
    "cosine": _cosine,
}


def learning_rate(config: TrainingConfig, round_: int, rounds: int) -> float:
    """Learning rate of round ``round_`` (1-based) of ``rounds``."""
    return config.lr * SCHEDULES[config.schedule](config, round_, rounds)


def make_optimizer(
    params: Iterable[nn.Parameter], lr: float, config: TrainingConfig
) -> torch.optim.Optimizer:
    """The configured optimizer over ``params``."""
    return OPTIMIZERS[config.optimizer](params, lr, config)


def optimizer_tensors(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """State of ``optimizer`` as ``slot:parameter`` → tensor. Detached, not copied."""
    return {
        f"{slot}:{names[cast(nn.Parameter, parameter)]}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    optimizer: Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of :func:`optimizer_tensors`; unknown names are ignored, missing slots start anew."""
    by_parameter: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        slot, _, name = key.partition(":")
        by_parameter.setdefault(name, {})[slot] = value.clone()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            slots = by_parameter.get(names[parameter])
            if slots:
                optimizer.state[parameter] = slots
