"""Batches whose labels are counted with the help of public images before they are attacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedkl.attacks.base import Attack, Progress, Reconstruction, each
from fedkl.attacks.labels import infer_labels, mean_probability, tells_labels
from fedkl.attacks.network import Network
from fedkl.errors import AttackError, number_of
from fedkl.observation import Observation


class Counted(Attack):
    """``attack`` with the labels of batches counted by what the model expects of public images.

    Without them the model is taken to expect every class alike, which is so before it is trained.
    Labels that the observation grants stay.

    Args:
        attack: Any attack that takes labels from the observation.
        images: Public images (M, C, H, W) in [0, 1].
        secrets: Private tensors with which the shared layers classify, such as
            :func:`fedkl.attacks.adaptive.train_secrets` finds them; those that the observation
            grants go before, neutral values stand for the rest.
    """

    name: str  # type: ignore[misc]  # of the attack within

    def __init__(
        self, attack: Attack, images: Tensor, secrets: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(attack=attack, images=len(images), secrets=sorted(secrets or ()))
        self.attack, self.images, self.secrets = attack, images, dict(secrets or {})
        self.name = attack.name

    def reconstruct(
        self,
        observations: Sequence[Observation],
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> list[Reconstruction]:
        """As :meth:`Attack.reconstruct`."""
        if not observations:
            raise AttackError("got no observation; expected one or more.")
        network = Network.of(observations)
        if not tells_labels(observations[0], network):
            return self.attack.reconstruct(observations, generator=generator, progress=progress)
        seen: dict[int, Tensor] = {}

        def count(observation: Observation) -> Observation:
            expected = seen.get(id(observation.known))
            if expected is None:
                # Of several clients nobody knows whose secrets to take: their own are alike enough.
                known = {} if observation.training.clients > 1 else observation.known
                expected = mean_probability(network, self.images, {**self.secrets, **known})
                seen[id(observation.known)] = expected
            found = infer_labels(observation, network, expected)
            own = observation.labels is not None
            return replace(observation, labels=found, ordered=own and observation.ordered)

        counted = each(observations, count)
        found = self.attack.reconstruct(counted, generator=generator, progress=progress)
        note = f"labels counted with {number_of(len(self.images), 'public image')}"
        return [replace(one, notes=(*one.notes, note)) for one in found]
