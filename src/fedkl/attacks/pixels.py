"""Attacks that search pixels: DLG, iDLG, Inverting Gradients."""

from __future__ import annotations

from copy import copy
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch.nn.functional import softmax

from fedkl.attacks.matching import GradientMatching
from fedkl.attacks.network import Tensors
from fedkl.attacks.search import LBFGS, Elementwise, Search, Trial, Trials
from fedkl.errors import ConfigError, unknown

OPTIMIZERS: Final = ("adam", "l-bfgs")
COSINE_SCALE: Final = 1e4  # lifts distances of 1e-6 above L-BFGS's guard against bad curvature


class PixelMatching(GradientMatching):
    """Unknowns are the pixels themselves, and soft labels where they are searched.

    Args:
        tv: Weight of the total variation.
        mean, deviation: Images start at mean + deviation * N(0, 1).
        box: Whether pixels are kept in [0, 1] after every step.
        further: As :class:`GradientMatching`.
    """

    adopts: ClassVar[bool] = True

    def __init__(
        self,
        *,
        iterations: int,
        restarts: int,
        distance: str,
        labels: str,
        lr: float,
        tv: float,
        mean: float,
        deviation: float,
        box: bool,
        parallel: int = 64,
    ) -> None:
        super().__init__(
            iterations=iterations,
            restarts=restarts,
            distance=distance,
            labels=labels,
            parallel=parallel,
            lr=lr,
            tv=tv,
            mean=mean,
            deviation=deviation,
            box=box,
        )
        if not (lr > 0 and tv >= 0 and deviation >= 0):  # NaN is none of it
            raise ConfigError(
                f"got lr {lr}, tv {tv}, deviation {deviation}; expected lr > 0, the others >= 0."
            )
        self.lr, self.tv, self.mean, self.deviation, self.box = lr, tv, mean, deviation, box

    def searching(self) -> GradientMatching:
        twin = copy(self)
        twin.labels = "search"
        return twin

    def start(self, trials: Trials, generator: torch.Generator) -> dict[str, Tensor]:
        x = self.mean + self.deviation * torch.randn(trials.shape, generator=generator)
        unknowns = {"images": x}
        if self.labels == "search":
            size = (*trials.shape[:3], trials.num_classes)
            unknowns["labels"] = torch.randn(size, generator=generator)
        return unknowns

    def adopt(self, unknowns: dict[str, Tensor], row: int, images: Tensor) -> None:
        unknowns["images"][row] = images

    def decode(self, unknowns: Tensors, trial: Trial) -> tuple[Tensor, Tensor]:
        if self.labels == "search":
            return unknowns["images"], softmax(unknowns["labels"], dim=-1)
        return unknowns["images"], trial.labels

    def prior(self, unknowns: Tensors, x: Tensor, iteration: Tensor) -> Tensor:
        return self.tv * total_variation(x) if self.tv else x.new_zeros(())

    def project(self, unknowns: dict[str, Tensor]) -> None:
        if self.box:
            unknowns["images"].clamp_(0, 1)


class DLG(PixelMatching):
    """Deep Leakage from Gradients (Zhu et al. 2019): L-BFGS on pixels and soft labels.

    ``iterations`` counts evaluations; the published 300 L-BFGS calls make up to 20 each.
    """

    name: ClassVar[str] = "dlg"

    def __init__(
        self,
        *,
        iterations: int = 6000,
        restarts: int = 1,
        lr: float = 1.0,
        labels: str = "search",
        parallel: int = 64,
    ) -> None:
        super().__init__(
            iterations=iterations,
            restarts=restarts,
            distance="squared",
            labels=labels,
            lr=lr,
            tv=0.0,
            mean=0.0,
            deviation=1.0,
            box=False,
            parallel=parallel,
        )

    def search(self, unknowns: dict[str, Tensor]) -> Search:
        return LBFGS(unknowns, lr=self.lr)


class IDLG(DLG):
    """Improved DLG (Zhao et al. 2020): the label is read off first, then DLG on the pixels."""

    name: ClassVar[str] = "idlg"

    def __init__(
        self,
        *,
        iterations: int = 6000,
        restarts: int = 1,
        lr: float = 1.0,
        parallel: int = 64,
    ) -> None:
        super().__init__(
            iterations=iterations, restarts=restarts, lr=lr, labels="infer", parallel=parallel
        )


class InvertingGradients(PixelMatching):
    """Inverting Gradients (Geiping et al. 2020): cosine, total variation, signed Adam, box.

    The step falls to a tenth after 3/8, 5/8 and 7/8 of the iterations. Weights of the total
    variation and the step are for pixels in [0, 1].

    Args:
        signed: Adam goes by the sign of the gradient, as published.
        optimizer: ``adam``, or ``l-bfgs``: steps of length ``lr`` (take 1) without box, on a smooth
            loss (take ``tv`` 0). The cosine is ill-conditioned on networks that pixels pass through
            easily; where its loss has no plateaus L-BFGS gets far in a few hundred iterations.
        further: As :class:`PixelMatching`.

    Raises:
        ConfigError: An unknown optimizer, or signed steps of L-BFGS.
    """

    name: ClassVar[str] = "inverting-gradients"

    def __init__(
        self,
        *,
        iterations: int = 4800,
        restarts: int = 1,
        lr: float = 0.1,
        tv: float = 1e-4,
        signed: bool = True,
        optimizer: str = "adam",
        distance: str = "cosine",
        labels: str = "infer",
        parallel: int = 64,
    ) -> None:
        if optimizer not in OPTIMIZERS:
            raise ConfigError(unknown("optimizer of inverting-gradients", optimizer, OPTIMIZERS))
        if signed and optimizer == "l-bfgs":
            raise ConfigError(
                "got signed steps of l-bfgs, which lose what it knows about curvature; expected "
                "signed=False with it."
            )
        super().__init__(
            iterations=iterations,
            restarts=restarts,
            distance=distance,
            labels=labels,
            lr=lr,
            tv=tv,
            mean=0.5,
            deviation=0.25,
            box=optimizer == "adam",
            parallel=parallel,
        )
        self.settings["signed"] = self.signed = signed
        self.settings["optimizer"] = self.optimizer = optimizer

    def search(self, unknowns: dict[str, Tensor]) -> Search:
        if self.optimizer == "l-bfgs":
            return LBFGS(unknowns, lr=self.lr, scale=COSINE_SCALE)
        return Elementwise(
            unknowns, torch.optim.Adam, lr=self.lr, schedule=thirds, signed=self.signed
        )


def thirds(share: float) -> float:
    """A tenth after 3/8, a hundredth after 5/8, a thousandth after 7/8 of the iterations."""
    return float(0.1 ** sum(share >= at / 8 for at in (3, 5, 7)))


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbors along both axes of images (..., H, W)."""
    down = (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
    right = (x[..., 1:] - x[..., :-1]).abs().mean()
    return down + right
