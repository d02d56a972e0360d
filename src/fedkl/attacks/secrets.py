"""What an attack makes of the victim's private tensors while it searches images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedkl.attacks.network import Network
from fedkl.observation import Observation

Tensors = Mapping[str, Tensor]
PREFIX = "secret:"


class Secrets(ABC):
    """Unknowns that stand for private tensors, shared by the T updates of one observation."""

    @abstractmethod
    def given(self, observation: Observation, network: Network) -> dict[str, Tensor]:
        """What does not change during the search, per victim; handed to :meth:`values`."""

    def start(
        self, observations: Sequence[Observation], rows: Sequence[int], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Unknowns of every trial, stacked, their names beginning with ``secret:``; or none.

        Args:
            observations: The victims.
            rows: Which victim each trial attacks.
            generator: For random starts.
        """
        return {}

    @abstractmethod
    def values(self, unknowns: Tensors, given: Tensors, network: Network) -> dict[str, Tensor]:
        """Every private tensor of the model by name, for one trial."""

    def prior(self, unknowns: Tensors) -> Tensor:
        """What is added to one trial's loss for implausible secrets."""
        return torch.zeros(())

    def ignored(self, observation: Observation, network: Network) -> frozenset[str]:
        """Names of shared parameters whose gradients are left out of the comparison."""
        return frozenset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Held(Secrets):
    """What the threat model grants, and the model's neutral values (γ = 1, β = 0) for the rest."""

    def given(self, observation: Observation, network: Network) -> dict[str, Tensor]:
        return {n: observation.known.get(n, value) for n, value in network.secrets.items()}

    def values(self, unknowns: Tensors, given: Tensors, network: Network) -> dict[str, Tensor]:
        return dict(given)
