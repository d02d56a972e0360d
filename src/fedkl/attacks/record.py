"""What a search by gradient matching has found so far: the best of trials, curves, pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.func import vmap

from fedkl.attacks.base import Progress, Reconstruction
from fedkl.attacks.search import Tensors, Trial, Trials
from fedkl.errors import AttackError

_LOST: Final = 2.0  # width of an image whose range a norm hides

Decode = Callable[[Tensors, Trial], tuple[Tensor, Tensor]]


def in_range(images: Tensor) -> Tensor:
    """``images`` (..., C, H, W) in [0, 1].

    Behind a first layer with a norm, the gradient tells no brightness and no contrast, and a search
    without a box wanders off: what it finds may be the image times ten. Such an image, more than
    twice as wide as [0, 1], is stretched over [0, 1] as a whole; any other is clipped.
    """
    low = images.amin(dim=(-3, -2, -1), keepdim=True)
    width = images.amax(dim=(-3, -2, -1), keepdim=True) - low
    stretched = (images - low) / torch.where(width > 0, width, 1.0)
    return torch.where(width > _LOST, stretched, images.clamp(0, 1))


class Record:
    """The best unknowns of every trial so far, and what is needed for curves and pictures."""

    POINTS = 20

    def __init__(self, decode: Decode, iterations: int, trials: Trials) -> None:
        self.decode, self.iterations, self.trials = decode, iterations, trials
        self.best: dict[str, Tensor] = {}
        self.loss = torch.full((trials.count,), torch.inf)
        self.restarts = torch.zeros(trials.count, dtype=torch.int64)
        self.at: list[int] = []
        self.losses: list[Tensor] = []
        self.frames: list[Tensor] = []

    def see(self, iteration: int, unknowns: dict[str, Tensor], loss: Tensor) -> None:
        """Keeps what is better than before."""
        if not self.best:
            self.best = {name: value.clone() for name, value in unknowns.items()}
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        for name, value in unknowns.items():
            mask = better.view(-1, *[1] * (value.dim() - 1))
            torch.where(mask, value, self.best[name], out=self.best[name])
        points, last = self.POINTS, self.iterations - 1
        if iteration in {round(i * last / (points - 1)) for i in range(points)}:
            self.at.append(iteration)
            self.losses.append(self.loss.clone())
            self.frames.append(self._images()[0][:, 0, 0])

    def _images(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x, y = vmap(self.decode)(self.best, self.trials.stacked)
        return in_range(x.detach()), y.argmax(dim=-1)

    def conclude(self) -> list[Reconstruction]:
        """One reconstruction per trial."""
        images, labels = self._images()
        frames = torch.stack(self.frames, dim=1)
        losses = torch.stack(self.losses, dim=1)
        return [
            Reconstruction(
                images=images[i],
                labels=labels[i],
                loss=float(self.loss[i]),
                losses=tuple(losses[i].tolist()),
                iterations=tuple(self.at),
                frames=frames[i],
                restarts=int(self.restarts[i]),
            )
            for i in range(self.trials.count)
        ]


def tell(
    done: tuple[int, int, Progress | None], count: int, iteration: int, all_: int, record: Record
) -> None:
    """Reports progress; ``done`` is (trials before, trials in all, listener)."""
    at, jobs, progress = done
    assert progress is not None
    share = (at + count * iteration / all_) / jobs
    finite = record.loss[torch.isfinite(record.loss)]
    mean = float(finite.mean()) if len(finite) else float("nan")
    progress(round(share * all_), all_, mean)


def refuse_lost(found: Sequence[Reconstruction]) -> list[Reconstruction]:
    """``found``, if every victim had a trial whose loss was finite at least once.

    Raises:
        AttackError: Some had not: there is no best among their trials, and the image of the first
            start would pass for what the attack found. Names them in ``victims``.
    """
    lost = [place for place, one in enumerate(found) if one.loss == float("inf")]
    if lost:
        message = (
            "no trial ever had a finite loss, so none of them found anything; give smaller steps "
            "(lr), another distance or more restarts, or look whether the update is out of scale."
        )
        raise AttackError(message, dict.fromkeys(lost, message))
    return list(found)
