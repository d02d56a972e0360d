"""Trials side by side, and the optimizers that move them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedkl.attacks.base import each
from fedkl.attacks.lbfgs import BatchedLBFGS
from fedkl.attacks.network import Network
from fedkl.attacks.secrets import Secrets
from fedkl.observation import Observation

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """What one trial is about; under vmap a stack of them, a leading axis on every tensor.

    Attributes:
        changes: The observed changes by parameter name, (T, *shape).
        labels: Label distributions (T, images, classes); zeros if they are searched.
        secrets: What :meth:`Secrets.given` gave.
        statistics: By norm, mean and variance of its input (T, 2, channels), where they were sent.
    """

    changes: dict[str, Tensor]
    labels: Tensor
    secrets: dict[str, Tensor] = field(repr=False)
    statistics: dict[str, Tensor] = field(default_factory=dict)


torch.utils._pytree.register_pytree_node(
    Trial,
    lambda trial: ([trial.changes, trial.labels, trial.secrets, trial.statistics], None),
    lambda parts, _: Trial(*parts),
)


@dataclass(frozen=True)
class Job:
    """What one trial is to try.

    Attributes:
        victim: Which observation it attacks.
        labels: Labels (T, images); None: searched.
        guess: Images (T, images, C, H, W) that it starts from; None: at random.
        note: What a reader has to know if its result is chosen.
    """

    victim: int
    labels: Tensor | None = None
    guess: Tensor | None = None
    note: str | None = None


@dataclass(frozen=True)
class Trials:
    """N trials that run as one batch.

    Attributes:
        observations: The victims.
        rows: Which victim each trial attacks, N.
        network: The public model, the same for all.
        stacked: The trials, stacked.
        secrets: What is made of the private tensors.
        guesses: Images (T, images, C, H, W) that a trial starts from, by its place among the N.
    """

    observations: Sequence[Observation]
    rows: Sequence[int]
    network: Network
    stacked: Trial
    secrets: Secrets
    guesses: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of trials, N."""
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, T, images, C, H, W) of the unknown images."""
        first = self.observations[0]
        return (self.count, first.count, first.training.images, *first.image_shape)

    @property
    def num_classes(self) -> int:
        """Length of the model's output."""
        return self.observations[0].num_classes

    @classmethod
    def of(
        cls,
        observations: Sequence[Observation],
        network: Network,
        jobs: Sequence[Job],
        secrets: Secrets,
    ) -> Trials:
        """Stacks what the trials of ``jobs`` need; all of them have labels, or none."""
        first = observations[0]
        rows = [job.victim for job in jobs]
        labels = [job.labels for job in jobs if job.labels is not None]
        changes = [_stack([network.observed(c) for c in o.changes]) for o in observations]
        heard = [
            _stack([network.statistics.observed(s) for s in o.statistics]) for o in observations
        ]
        given = each(observations, lambda o: secrets.given(o, network))
        if labels:
            y = one_hot(torch.stack(labels), first.num_classes).to(torch.get_default_dtype())
        else:
            y = torch.zeros(len(jobs), first.count, first.training.images, first.num_classes)
        index = torch.as_tensor(rows)
        stacked = Trial(
            {n: t[index] for n, t in _stack(changes).items()},
            y,
            {n: t[index] for n, t in _stack(given).items()},
            {n: t[index] for n, t in _stack(heard).items()},
        )
        guesses = {at: job.guess for at, job in enumerate(jobs) if job.guess is not None}
        return cls(observations, rows, network, stacked, secrets, guesses)


def _stack(items: Sequence[Tensors]) -> dict[str, Tensor]:
    names = items[0] if items else ()
    return {name: torch.stack([item[name] for item in items]) for name in names}


class Search(ABC):
    """Moves the stacked unknowns (in place)."""

    @abstractmethod
    def step(self, gradients: Tensors, share: float) -> None:
        """One step; ``share`` of the iterations in [0, 1) is done."""

    @abstractmethod
    def restart(self, rows: Tensor, gradients: Tensors, fresh: Tensors) -> None:
        """Puts the trials ``rows`` (bool (N,)) to ``fresh`` unknowns, history forgotten.

        Their gradients are set to zero, so that the next step leaves them there.
        """


class Elementwise(Search):
    """Any optimizer of torch that treats every entry by itself: Adam, RMSprop, SGD.

    Args:
        unknowns: Stacked unknowns; changed in place.
        make: Builds the optimizer from parameter groups.
        lr: Learning rate at the beginning.
        rates: Factor on the learning rate by the beginning of an unknown's name.
        schedule: Factor on all rates by the share of iterations done.
        signed: Steps go by the sign of the gradient (Geiping et al. 2020).
    """

    def __init__(
        self,
        unknowns: dict[str, Tensor],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        *,
        lr: float,
        rates: Mapping[str, float] | None = None,
        schedule: Callable[[float], float] = lambda share: 1.0,
        signed: bool = False,
    ) -> None:
        self.unknowns, self.schedule, self.signed = unknowns, schedule, signed
        groups: list[dict[str, Any]] = []
        self.rates: list[float] = []
        for name, value in unknowns.items():
            factor = next((f for start, f in (rates or {}).items() if name.startswith(start)), 1.0)
            groups.append({"params": [value], "lr": lr * factor})
            self.rates.append(lr * factor)
        self.optimizer = make(groups)

    def step(self, gradients: Tensors, share: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule(share)
        for name, value in self.unknowns.items():
            signed = self.signed and not name.startswith("secret:")
            value.grad = gradients[name].sign() if signed else gradients[name]
        self.optimizer.step()

    def restart(self, rows: Tensor, gradients: Tensors, fresh: Tensors) -> None:
        for name, value in self.unknowns.items():
            value[rows] = fresh[name][rows]
            gradients[name][rows] = 0
            for state in self.optimizer.state[value].values():
                if isinstance(state, Tensor) and state.shape == value.shape:
                    state[rows] = 0


class LBFGS(Search):
    """Batched L-BFGS over all unknowns of a trial together.

    Args:
        unknowns: Stacked unknowns; changed in place.
        lr: Step length.
        history: Pairs kept.
        scale: Factor on the loss. Steps do not depend on it but for the first one and the guard
            against curvature below 1e-10, which would stop losses that are tiny by nature.
    """

    def __init__(
        self, unknowns: dict[str, Tensor], *, lr: float, history: int = 100, scale: float = 1.0
    ) -> None:
        self.unknowns, self.scale = unknowns, scale
        flat = self._flat(unknowns)
        self.solver = BatchedLBFGS(
            (flat.shape[0], flat.shape[1]), lr=lr, history=history, like=flat
        )

    def _flat(self, tensors: Tensors) -> Tensor:
        return torch.cat([tensors[name].flatten(1) for name in self.unknowns], dim=1)

    def step(self, gradients: Tensors, share: float) -> None:
        change = self.solver.step(self._flat(gradients) * self.scale)
        sizes = [value[0].numel() for value in self.unknowns.values()]
        parts = torch.split(change, sizes, dim=1)
        for value, part in zip(self.unknowns.values(), parts, strict=True):
            value.add_(part.view_as(value))

    def restart(self, rows: Tensor, gradients: Tensors, fresh: Tensors) -> None:
        for name, value in self.unknowns.items():
            value[rows] = fresh[name][rows]
            gradients[name][rows] = 0
        self.solver.restart(rows)
