"""Batch-norm statistics that cross the wire: mean and variance of what the norms were given.

A shared running statistic moves by r ← (1 - m)·r + m·b with every batch. Before and after are
known, so b is: the mean (variance) per channel, which the gradient behind the norm does not tell.
That of the first norm is brightness and contrast of the image as its stem sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkl.observation import Training

Tensors = Mapping[str, Tensor]
Heard = dict[str, Tensor]
"""By norm: mean and unbiased variance of its input, (2, channels)."""

RUNNING: Final = ("running_mean", "running_var")
_EPS: Final = 1e-5


class Statistics:
    """What updates tell of the inputs of their batch norms.

    Args:
        model: The public model as the client got it, running statistics included.
        sent: Names of the buffers that were sent.
        training: How the update was made.
    """

    def __init__(self, model: nn.Module, sent: Sequence[str], training: Training) -> None:
        self.before: dict[str, Tensor] = {}
        self.rates: dict[str, float] = {}
        self.steps = training.local_steps
        if not training.train_mode:
            return
        for name, module in model.named_modules():
            names = [f"{name}.{kind}" for kind in RUNNING]
            # Without a momentum the mean is over all batches ever, of which nobody knows how many.
            if isinstance(module, _BatchNorm) and module.momentum and set(names) <= set(sent):
                mean, variance = module.running_mean, module.running_var
                assert mean is not None
                assert variance is not None
                self.before[name] = torch.stack([mean, variance]).detach().clone()
                self.rates[name] = module.momentum

    def observed(self, sent: Tensors) -> Heard:
        """Mean and variance behind the buffers that one update brought."""
        found = {}
        for name, before in self.before.items():
            after = torch.stack([sent[f"{name}.running_mean"], sent[f"{name}.running_var"]])
            left = (1 - self.rates[name]) ** self.steps
            found[name] = (after.detach() - left * before) / (1 - left)
        return found

    def over(self, steps: Sequence[Heard]) -> Heard:
        """The mean over steps that :meth:`observed` sees: the last ones weigh more."""
        found = {}
        for name, rate in self.rates.items():
            left = 1 - rate
            weights = [rate * left**age / (1 - left ** len(steps)) for age in range(len(steps))]
            parts = [w * one[name] for w, one in zip(reversed(weights), steps, strict=True)]
            found[name] = torch.stack(parts).sum(dim=0)
        return found

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[Heard]:
        """What the norms of ``model`` are given within the block, filled in as it runs."""
        heard: Heard = {}

        def hook(name: str) -> Any:
            def listen(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].transpose(0, 1).flatten(1)
                heard[name] = torch.stack([x.mean(dim=1), x.var(dim=1)])

            return listen

        handles = [
            model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in self.rates
        ]
        try:
            yield heard
        finally:
            for handle in handles:
                handle.remove()


def misfit(made: Heard, seen: Heard) -> Tensor:
    """How far two sets of statistics are apart: mean over norms and channels, 0 if they agree.

    Means are compared in deviations, variances by the logarithm of their ratio.
    """
    found = []
    for name, (mean, variance) in seen.items():
        variance = variance.clamp_min(0) + _EPS
        far = (made[name][0] - mean).square() / variance
        wide = ((made[name][1] + _EPS) / variance).log().square()
        found.append((far + wide).mean())
    return torch.stack(found).mean()
