"""GGL: the image is searched in the latent space of a generator (Li, Zhang, Liu, Liu 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from torch.func import vmap

from fedkl.attacks.base import Progress, Reconstruction
from fedkl.attacks.evolution import Evolution
from fedkl.attacks.generators import check_generator
from fedkl.attacks.matching import GradientMatching
from fedkl.attacks.network import Tensors
from fedkl.attacks.record import Record, tell
from fedkl.attacks.search import Elementwise, Search, Trial, Trials
from fedkl.attacks.secrets import PREFIX
from fedkl.errors import AttackError, ConfigError, unknown

SEARCHES: Final = ("gradient", "cma-es")
LATENT: Final = "latent"


def divergence(z: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of the entries of ``z``: 0 where they look standard."""
    mean, variance = z.mean(), z.var(unbiased=False) + 1e-12
    return (mean.square() + variance - 1 - variance.log()) / 2


class GGL(GradientMatching):
    """Generative Gradient Leakage (Li et al. 2022): label first, then the latent of a generator.

    The images can only be what the generator makes, so noise on the gradient or a lock cannot take
    them off the manifold; nor can they show what it never learned.

    Args:
        generator_model: An ``nn.Module`` with an integer attribute ``latent`` that maps noise
            (N, latent) and labels int64 (N,) to images (N, C, H, W) in [0, 1], without statistics
            over the batch. It is used as it is, in its own mode; nothing is trained.
        iterations: Evaluations of the loss per restart; with CMA-ES, generations.
        restarts: Latents per observation that are searched; the one with the least loss is chosen.
        search: ``gradient`` (Adam) or ``cma-es`` (as published; needs the extra ``audit``).
        distance: A name in :data:`fedkl.attacks.distances.DISTANCES`. ``squared`` is published; the
            cosine does not depend on how well the model is trained, and found better images.
        lr: Of Adam on the latent; it falls to zero along a straight line.
        kl: Weight of the divergence of the latent's mean and variance from those of N(0, 1).
        spread: CMA-ES's standard deviation at the beginning.
        population: CMA-ES's candidates per generation; None: 4 + 3 log(dimensions).
        secret_lr: Adam's learning rate of the unknowns that stand for private tensors.
        parallel: Trials that run as one batch; with CMA-ES candidates evaluated as one batch.
    """

    name: ClassVar[str] = "ggl"

    def __init__(
        self,
        generator_model: nn.Module,
        *,
        iterations: int = 200,
        restarts: int = 1,
        search: str = "gradient",
        distance: str = "cosine",
        lr: float = 0.2,
        kl: float = 1e-4,
        spread: float = 0.5,
        population: int | None = None,
        secret_lr: float = 1e-2,
        parallel: int = 64,
    ) -> None:
        super().__init__(
            iterations=iterations,
            restarts=restarts,
            distance=distance,
            labels="infer",
            parallel=parallel,
            search=search,
            lr=lr,
            kl=kl,
            spread=spread,
            population=population,
            secret_lr=secret_lr,
        )
        if search not in SEARCHES:
            raise ConfigError(unknown("search of ggl", search, SEARCHES))
        positive = lr > 0 and spread > 0 and secret_lr > 0  # NaN is not
        if not (positive and kl >= 0) or (population or 4) < 4:
            raise ConfigError(
                f"got lr {lr}, spread {spread}, secret_lr {secret_lr}, kl {kl}, population "
                f"{population}; expected the first three > 0, kl >= 0, a population of 4 or more."
            )
        self.settings = {"generator_model": type(generator_model).__name__, **self.settings}
        self.latent = check_generator(generator_model)
        self.make, self.how, self.lr, self.kl = generator_model, search, lr, kl
        self.spread, self.population, self.secret_lr = spread, population, secret_lr

    def start(self, trials: Trials, generator: torch.Generator) -> dict[str, Tensor]:
        self._check(trials)
        return {LATENT: torch.randn(*trials.shape[:3], self.latent, generator=generator)}

    def decode(self, unknowns: Tensors, trial: Trial) -> tuple[Tensor, Tensor]:
        z, y = unknowns[LATENT], trial.labels
        x = self.make(z.flatten(0, 1), y.argmax(dim=-1).flatten())
        return x.view(*z.shape[:2], *x.shape[1:]), y

    def prior(self, unknowns: Tensors, x: Tensor, iteration: Tensor) -> Tensor:
        return self.kl * divergence(unknowns[LATENT])

    def search(self, unknowns: dict[str, Tensor]) -> Search:
        return Elementwise(
            unknowns,
            torch.optim.Adam,
            lr=self.lr,
            rates={PREFIX: self.secret_lr / self.lr},
            schedule=lambda share: 1 - share,
        )

    def _check(self, trials: Trials) -> None:
        """The generator's images must be images of the victim's model."""
        with torch.no_grad():
            made = self.make(torch.zeros(1, self.latent), torch.zeros(1, dtype=torch.int64))
        wanted = (1, *trials.observations[0].image_shape)
        if tuple(made.shape) != wanted:
            raise AttackError(
                f"the generator makes images {tuple(made.shape)}, the victim's are {wanted}; train "
                "one on public images of that size (fedkl.attacks.train_generator)."
            )

    def _run(
        self,
        trials: Trials,
        generator: torch.Generator,
        done: tuple[int, int, Progress | None],
    ) -> list[Reconstruction]:
        if self.how == "gradient":
            return super()._run(trials, generator, done)
        evolution = Evolution(
            lambda: self._begin(trials, generator),
            spread=self.spread,
            population=self.population,
            generator=generator,
        )
        record = Record(self.decode, self.iterations, trials)
        evaluate = self._population(trials)
        for iteration in range(self.iterations):
            candidates = evolution.ask()
            losses = evaluate(candidates, iteration / self.iterations)
            record.restarts += evolution.tell(losses).long()
            least = torch.where(torch.isfinite(losses), losses, torch.inf).min(dim=1)
            rows = torch.arange(trials.count)
            chosen = {name: value[rows, least.indices] for name, value in candidates.items()}
            record.see(iteration, chosen, least.values)
            if done[2] is not None and (iteration % 10 == 9 or iteration == self.iterations - 1):
                tell(done, trials.count, iteration + 1, self.iterations, record)
        return record.conclude()

    def _population(self, trials: Trials) -> Callable[[dict[str, Tensor], float], Tensor]:
        """Losses (trials, candidates) of a generation, without gradients by the unknowns."""
        one_trial = vmap(self._loss(trials), in_dims=(0, None, None))

        def evaluate(candidates: dict[str, Tensor], share: float) -> Tensor:
            size = candidates[LATENT].shape[1]
            every = vmap(one_trial, in_dims=(0, 0, None), chunk_size=max(1, self.parallel // size))
            with torch.no_grad():
                losses: Tensor = every(candidates, trials.stacked, torch.tensor(share))
            return losses

        return evaluate
