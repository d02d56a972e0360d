"""GRNN: instead of pixels, the weights of a generator are searched (Ren, Deng, Xie 2022)."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.functional import interpolate, softmax

from fedkl.attacks.base import Progress, Reconstruction
from fedkl.attacks.matching import GradientMatching
from fedkl.attacks.network import Tensors
from fedkl.attacks.pixels import total_variation
from fedkl.attacks.search import Elementwise, Search, Trial, Trials
from fedkl.attacks.secrets import PREFIX
from fedkl.errors import ConfigError
from fedkl.rng import borrowed

NOISE = "noise"


class TwoHeads(nn.Module):
    """From noise (B, latent) to images (B, C, H, W) in [0, 1] and label logits (B, classes).

    The image branch doubles its maps until they have the size of the image: nearest-neighbor
    upsampling, 3x3 convolution, normalization, gated linear unit. The normalization is by instance
    and map: it is what the published batch norm does at batch size 1, it needs no running
    statistics, which :func:`torch.func.vmap` forbids, and the images of a batch keep apart.

    Args:
        latent: Length of the noise vector.
        width: Channels of every map.
        image_shape: (C, H, W).
        num_classes: Length of the label head.
    """

    def __init__(
        self, latent: int, width: int, image_shape: tuple[int, int, int], num_classes: int
    ) -> None:
        super().__init__()
        channels, height, width_px = image_shape
        self.sizes = doublings(height, width_px)
        self.width = width
        self.stem = nn.Linear(latent, width * self.sizes[0][0] * self.sizes[0][1])
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
                nn.GroupNorm(2 * width, 2 * width),
                nn.GLU(dim=1),
            )
            for _ in self.sizes[1:]
        )
        self.image = nn.Conv2d(width, channels, 3, padding=1)
        self.label = nn.Linear(latent, num_classes)

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(noise).view(-1, self.width, *self.sizes[0])
        for size, block in zip(self.sizes[1:], self.blocks, strict=True):
            x = block(interpolate(x, size=size, mode="nearest"))
        return self.image(x).sigmoid(), self.label(noise)


def doublings(height: int, width: int) -> list[tuple[int, int]]:
    """Sizes of maps from at most 4x4 up to (height, width), each half the next, rounded up."""
    sizes = [(height, width)]
    while max(sizes[0]) > 4:
        sizes.insert(0, (-(-sizes[0][0] // 2), -(-sizes[0][1] // 2)))
    return sizes


class GRNN(GradientMatching):
    """Generative Regression Neural Network (Ren et al. 2022): one generator per victim.

    A generator with an image head and a label head starts at random and gets one fixed noise
    vector per image; its weights are trained until the gradient of what it makes is the observed.
    Squared and Wasserstein distance plus a little total variation, RMSprop.

    Args:
        iterations: Evaluations of the loss; 20,000 are published.
        restarts: Generators per observation; the one with the least loss is chosen.
        labels: ``search`` (the label head) or ``infer``.
        lr, momentum: Of RMSprop; 1e-4 and 0.99 are published.
        tv: Weight of the mean absolute difference of neighbors.
        latent: Length of a noise vector.
        width: Channels of the generator's maps.
        secret_lr: Learning rate of the unknowns that stand for private tensors.
        distance: A name in :data:`fedkl.attacks.distances.DISTANCES`.
        parallel: Victims that run as one batch.
    """

    name: ClassVar[str] = "grnn"

    def __init__(
        self,
        *,
        iterations: int = 20000,
        restarts: int = 1,
        labels: str = "search",
        lr: float = 1e-4,
        momentum: float = 0.99,
        tv: float = 1e-6,
        latent: int = 128,
        width: int = 32,
        secret_lr: float = 1e-2,
        distance: str = "grnn",
        parallel: int = 16,
    ) -> None:
        super().__init__(
            iterations=iterations,
            restarts=restarts,
            distance=distance,
            labels=labels,
            parallel=parallel,
            lr=lr,
            momentum=momentum,
            tv=tv,
            latent=latent,
            width=width,
            secret_lr=secret_lr,
        )
        if not (lr > 0 and secret_lr > 0 and tv >= 0 and 0 <= momentum < 1):  # NaN is none of it
            raise ConfigError(
                f"got lr {lr}, secret_lr {secret_lr}, tv {tv}, momentum {momentum}; "
                "expected rates > 0, tv >= 0, momentum in [0, 1)."
            )
        if min(latent, width) < 1:
            raise ConfigError(f"got latent {latent}, width {width}; expected 1 or more of each.")
        self.lr, self.momentum, self.tv, self.secret_lr = lr, momentum, tv, secret_lr
        self.latent, self.width = latent, width
        self.heads: TwoHeads | None = None

    def searching(self) -> GradientMatching:
        twin = copy(self)
        twin.labels = "search"
        return twin

    def _run(
        self,
        trials: Trials,
        generator: torch.Generator,
        done: tuple[int, int, Progress | None],
    ) -> list[Reconstruction]:
        # The generator's form depends on the images: it belongs to the run, not to the attack.
        run = copy(self)
        with torch.device("meta"):
            run.heads = self._heads(trials)
        return super(GRNN, run)._run(trials, generator, done)

    def _heads(self, trials: Trials) -> TwoHeads:
        shape = trials.observations[0].image_shape
        return TwoHeads(self.latent, self.width, shape, trials.num_classes)

    def start(self, trials: Trials, generator: torch.Generator) -> dict[str, Tensor]:
        with borrowed(generator):
            weights, _ = stack_module_state([self._heads(trials) for _ in range(trials.count)])
            noise = torch.randn(*trials.shape[:3], self.latent)
        return {NOISE: noise} | {name: value.detach() for name, value in weights.items()}

    def decode(self, unknowns: Tensors, trial: Trial) -> tuple[Tensor, Tensor]:
        assert self.heads is not None
        # Fixed, but of this trial: among the unknowns its gradient is zero, so that it stays.
        noise = unknowns[NOISE].detach()
        weights = {n: v for n, v in unknowns.items() if n != NOISE and not n.startswith(PREFIX)}
        x, logits = functional_call(self.heads, weights, (noise.flatten(0, 1),))
        x = x.view(*noise.shape[:2], *x.shape[1:])
        if self.labels == "infer":
            return x, trial.labels
        return x, softmax(logits.view(*noise.shape[:2], -1), dim=-1)

    def search(self, unknowns: dict[str, Tensor]) -> Search:
        return Elementwise(
            unknowns,
            partial(torch.optim.RMSprop, momentum=self.momentum),
            lr=self.lr,
            rates={PREFIX: self.secret_lr / self.lr},
        )

    def prior(self, unknowns: Tensors, x: Tensor, iteration: Tensor) -> Tensor:
        return self.tv * total_variation(x)
