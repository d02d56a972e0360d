"""Optimizers and schedules against torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fedhelp import assert_same
from torch import nn

from fedkl.federation import TrainingConfig
from fedkl.federation.optim import (
    OPTIMIZERS,
    SCHEDULES,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)

TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.7, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.7, weight_decay=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.1, weight_decay=0.01),
}


def settings(name: str, **changes: Any) -> TrainingConfig:
    return TrainingConfig(optimizer=name, lr=0.1, momentum=0.7, weight_decay=0.01, **changes)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for number in range(count):
        optimizer.zero_grad()
        net(torch.linspace(-1, number + 1, 6).view(2, 3)).square().sum().backward()
        optimizer.step()


def test_every_optimizer_and_schedule_is_tested() -> None:
    assert set(TORCH) == set(OPTIMIZERS)
    assert set(SCHEDULES) == {"constant", "step", "cosine"}


@pytest.mark.parametrize("name", TORCH)
def test_optimizers_are_torchs(name: str) -> None:
    nets = []
    for build in (lambda p: make_optimizer(p, 0.1, settings(name)), TORCH[name]):
        torch.manual_seed(1)
        net = nn.Linear(3, 2)
        steps(net, build(net.parameters()), 4)
        nets.append(net)
    assert_same(nets[0].state_dict(), nets[1].state_dict())


@pytest.mark.parametrize("name", TORCH)
def test_state_goes_out_and_in(name: str) -> None:
    """Four steps are the same as two, a round trip of the state, and two more."""
    torch.manual_seed(1)
    net = nn.Linear(3, 2)
    names = {p: n for n, p in net.named_parameters()}
    optimizer = make_optimizer(net.parameters(), 0.1, settings(name))
    steps(net, optimizer, 2)
    half = {n: p.detach().clone() for n, p in net.named_parameters()}
    kept = {n: t.clone() for n, t in optimizer_tensors(optimizer, names).items()}
    assert {n.partition(":")[2] for n in kept} == {"weight", "bias"}
    steps(net, optimizer, 2)
    other = nn.Linear(3, 2)
    other.load_state_dict(half)
    names = {p: n for n, p in other.named_parameters()}
    fresh = make_optimizer(other.parameters(), 0.1, settings(name))
    before = {n: t.clone() for n, t in kept.items()}
    load_optimizer_tensors(fresh, names, kept)
    steps(other, fresh, 2)
    assert_same(other.state_dict(), net.state_dict())
    assert_same(kept, before)


def test_plain_sgd_has_no_state() -> None:
    net = nn.Linear(3, 2)
    config = TrainingConfig(momentum=0.0, nesterov=False)
    optimizer = make_optimizer(net.parameters(), 0.1, config)
    steps(net, optimizer, 1)
    assert optimizer_tensors(optimizer, {p: n for n, p in net.named_parameters()}) == {}


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
def test_schedules_are_torchs(schedule: str) -> None:
    rounds, milestones = 12, (3, 7)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    ours = TrainingConfig(lr=0.4, schedule=schedule, milestones=milestones, decay=0.2)
    schedulers: dict[str, Any] = {
        "constant": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        "step": lambda: torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones), 0.2),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds),
    }
    scheduler = schedulers[schedule]()
    for number in range(1, rounds + 1):
        want = optimizer.param_groups[0]["lr"]
        assert learning_rate(ours, number, rounds) == pytest.approx(want, rel=1e-9, abs=1e-12)
        optimizer.step()
        scheduler.step()
