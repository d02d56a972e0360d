"""From what a client gives away to the image: learned on a shadow, applied to the victim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot

from fedkl.rng import borrowed

RESTANDARDIZATIONS: Final = (None, "global", "label")
RIDGES: Final = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Classes with fewer victims than this tell too little about their own mean.
MIN_PER_CLASS: Final = 5


@dataclass(frozen=True)
class Coordinates:
    """The shadow's inputs, unfolded and standardized per entry; victims are brought into the same.

    Attributes:
        unfold: Whether inputs were within (0, 1) and are turned into log odds (sigmoid undone).
        mean, deviation: Per entry, of the shadow's unfolded inputs.
        class_means: Standardized means per class (classes, d).
    """

    unfold: bool
    mean: Tensor
    deviation: Tensor
    class_means: Tensor

    @classmethod
    def of(cls, inputs: Tensor, labels: Tensor, num_classes: int) -> Coordinates:
        """From the shadow's inputs (N, d) and labels (N,)."""
        unfold = bool((inputs.min() > 0) & (inputs.max() < 1))
        x = _log_odds(inputs) if unfold else inputs
        mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0)
        means = _class_means((x - mean) / _safe(deviation), labels, num_classes)
        return cls(unfold, mean, deviation, means)

    def enter(self, inputs: Tensor) -> Tensor:
        """Inputs (N, d) in these coordinates, by the shadow's own mean and deviation."""
        x = _log_odds(inputs) if self.unfold else inputs
        return (x - self.mean) / _safe(self.deviation)

    def align(self, inputs: Tensor, labels: Tensor, how: str | None) -> Tensor:
        """Victims' inputs (N, d) in these coordinates.

        Args:
            inputs: Of victims under one lock.
            labels: Their labels (N,), as leaked.
            how: None: as :meth:`enter`. ``global``: by the victims' own mean and deviation.
                ``label``: moreover every entry takes the sign with which its class means agree
                with the shadow's, and every class with enough victims the shadow's mean.
        """
        if how is None:
            return self.enter(inputs)
        x = _log_odds(inputs.clamp(0, 1)) if self.unfold else inputs
        x = (x - x.mean(dim=0)) / _safe(x.std(dim=0, correction=0))
        if how == "global":
            return x
        counts = torch.bincount(labels, minlength=len(self.class_means))
        enough = counts >= MIN_PER_CLASS
        mine = _class_means(x, labels, len(self.class_means))
        agree = (mine * self.class_means)[enough].sum(dim=0)
        signs = torch.where(agree < 0, -1.0, 1.0)
        shift = torch.where(enough[:, None], self.class_means - mine * signs, 0.0)
        return x * signs + shift[labels]


class Decoder:
    """Ridge regression from standardized inputs and label to the image, then a network on the rest.

    Args:
        coordinates: Of the shadow's inputs.
        num_classes: Number of labels.
        hidden: Width of the network with two hidden layers; 0 for none.
        epochs: Passes over the shadow's images.
    """

    def __init__(
        self, coordinates: Coordinates, num_classes: int, *, hidden: int, epochs: int
    ) -> None:
        self.coordinates, self.num_classes = coordinates, num_classes
        self.hidden, self.epochs = hidden, epochs
        self.linear = torch.empty(0)
        self.network: nn.Module | None = None

    def fit(
        self,
        inputs: Tensor,
        labels: Tensor,
        images: Tensor,
        generator: torch.Generator,
        on_epoch: Callable[[float], None] = lambda loss: None,
    ) -> None:
        """Learns from the shadow's inputs (N, d), labels (N,) and images (N, C, H, W)."""
        x = self._with_label(self.coordinates.enter(inputs), labels)
        y = images.flatten(1)
        self.linear = ridge(x, y, generator)
        if self.hidden == 0:
            return
        self.network = self._build(x.shape[1], y.shape[1], generator)
        rest = y - x @ self.linear
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, weight_decay=1e-2)
        steps = self.epochs * -(-len(x) // 128)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(self.epochs):
            total = 0.0
            for rows in torch.split(torch.randperm(len(x), generator=generator), 128):
                optimizer.zero_grad(set_to_none=True)
                # Noise on the inputs: the victim's are never quite where the shadow's are.
                noise = 0.1 * torch.randn(x[rows].shape, generator=generator)
                loss = mse_loss(self.network(x[rows] + noise), rest[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(rows)
            on_epoch(total / len(x))

    def decode(self, standardized: Tensor, labels: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Images (N, *shape) in [0, 1] from inputs in the shadow's coordinates."""
        x = self._with_label(standardized, labels)
        with torch.no_grad():
            y = x @ self.linear
            if self.network is not None:
                y = y + self.network(x)
        return y.view(len(x), *shape).clamp(0, 1)

    def _with_label(self, x: Tensor, labels: Tensor) -> Tensor:
        # A far outlier (a saturated unit, a victim of another scale) must not drown the rest.
        return torch.cat([x.clamp(-6, 6), one_hot(labels, self.num_classes).to(x.dtype)], dim=1)

    def _build(self, inputs: int, outputs: int, generator: torch.Generator) -> nn.Module:
        with borrowed(generator):
            network = nn.Sequential(
                nn.Linear(inputs, self.hidden),
                nn.GELU(),
                nn.Linear(self.hidden, self.hidden),
                nn.GELU(),
                nn.Linear(self.hidden, outputs),
            )
            last = network[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)  # so that it starts at the ridge regression
            nn.init.zeros_(last.bias)
        return network


def ridge(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Coefficients (d, outputs) of y ≈ x w; the penalty is chosen on a tenth of the rows."""
    order = torch.randperm(len(x), generator=generator)
    held = max(1, len(x) // 10)
    test, train = order[:held], order[held:]
    gram, moment = x[train].T @ x[train], x[train].T @ y[train]
    scale = gram.diagonal().mean()
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    best, error = torch.zeros_like(moment), torch.inf
    for penalty in RIDGES:
        w = torch.linalg.solve(gram + penalty * scale * eye, moment)
        now = float((x[test] @ w - y[test]).square().mean())
        if now < error:
            best, error = w, now
    return best


def _log_odds(x: Tensor) -> Tensor:
    return torch.logit(x, eps=1e-6)


def _safe(deviation: Tensor) -> Tensor:
    return torch.where(deviation > 1e-8, deviation, torch.inf)  # a constant entry becomes zero


def _class_means(x: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    sums = x.new_zeros(num_classes, x.shape[1]).index_add_(0, labels, x)
    counts = torch.bincount(labels, minlength=num_classes)
    return sums / counts.clamp_min(1)[:, None]
