"""CMA-ES on many victims at once: an optimizer for what has no useful gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from fedkl.errors import AttackError, ConfigError

# CMA-ES keeps a covariance of all pairs of unknowns and decomposes it every few generations.
MOST_UNKNOWNS: Final = 2000
WORST: Final = 1e30


def check_cma() -> Any:
    """The module ``cma``.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import cma
    except ImportError as error:
        raise ConfigError(
            "searching by CMA-ES needs the package cma, which is not installed; run "
            "pip install 'fedkl[audit]', or search by gradient."
        ) from error
    return cma


class Evolution:
    """N independent searches by CMA-ES (Hansen 2016), one per trial, over all its unknowns.

    Args:
        begin: Fresh unknowns of every trial, stacked, each (N, ...): where the means start.
        spread: Standard deviation of the first generation.
        population: Candidates per generation and trial; None: 4 + 3 log(unknowns).
        generator: For CMA-ES's own draws; numpy's global randomness is not touched.

    Raises:
        ConfigError: The package ``cma`` is missing.
        AttackError: Too many unknowns per trial.
    """

    def __init__(
        self,
        begin: Callable[[], Mapping[str, Tensor]],
        *,
        spread: float,
        population: int | None,
        generator: torch.Generator,
    ) -> None:
        self.begin, self.generator = begin, generator
        self.spread, self.population = spread, population
        first = begin()
        self.like = {name: value[0] for name, value in first.items()}
        size = sum(value.numel() for value in self.like.values())
        if size > MOST_UNKNOWNS:
            raise AttackError(
                f"CMA-ES cannot search {size} unknowns, expected {MOST_UNKNOWNS} or fewer; "
                "search by gradient, or give a generator with a smaller latent."
            )
        self.strategies = [self._strategy(row) for row in self._flat(first)]
        self.asked: list[list[Any]] = []

    def ask(self) -> dict[str, Tensor]:
        """The next generation by name, each (N, population, ...)."""
        self.asked = [list(strategy.ask()) for strategy in self.strategies]
        rows = [[torch.from_numpy(x) for x in candidates] for candidates in self.asked]
        flat = torch.stack([torch.stack(row) for row in rows])
        parts = torch.split(flat, [value.numel() for value in self.like.values()], dim=-1)
        return {
            name: part.reshape(*flat.shape[:2], *value.shape).to(value.dtype)
            for (name, value), part in zip(self.like.items(), parts, strict=True)
        }

    def tell(self, losses: Tensor) -> Tensor:
        """Takes the losses (N, population) of what was asked for.

        Candidates whose loss is not finite rank last; a trial that has no others starts over.

        Returns:
            bool (N,): the trials that started over.
        """
        lost = ~torch.isfinite(losses).any(dim=1)
        fresh = self._flat(self.begin()) if bool(lost.any()) else losses
        for i, loss in enumerate(losses.nan_to_num(WORST, WORST, WORST)):
            if bool(lost[i]):
                self.strategies[i] = self._strategy(fresh[i])
            else:
                self.strategies[i].tell(self.asked[i], loss.tolist())
        return lost

    def _flat(self, unknowns: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([unknowns[name].flatten(1) for name in self.like], dim=1)

    def _strategy(self, mean: Tensor) -> Any:
        cma = check_cma()

        def normal(*shape: int) -> Any:
            drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
            return drawn.numpy()

        options: dict[str, Any] = {"randn": normal, "verbose": -9}
        if self.population is not None:
            options["popsize"] = self.population
        return cma.CMAEvolutionStrategy(mean.double().numpy(), self.spread, options)
