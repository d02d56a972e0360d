"""Any gradient-matching attack, carried out by someone who knows about the lock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from fedkl.attacks.adaptive.unknowns import AdaptiveSecrets
from fedkl.attacks.base import Attack, Progress, Reconstruction, each
from fedkl.attacks.labels import infer_labels, tells_labels
from fedkl.attacks.matching import GradientMatching
from fedkl.attacks.network import Network
from fedkl.attacks.record import refuse_lost
from fedkl.errors import AttackError
from fedkl.observation import Observation

NOISE: Final = 0.02  # deviation, of pixels in [0, 1]


class Adaptive(Attack):
    """``attack`` with the victim's secrets treated as ``secrets`` says.

    The T updates of one observation were made under one lock: its secrets are searched once for
    all of them. Works for gradients and for unrolled updates: there γ and β take the steps that a
    client's do, whatever they are computed from (:mod:`fedkl.attacks.learned` says what of that is
    approximate).

    Args:
        attack: Any attack that searches by gradient matching.
        secrets: What is made of the private tensors.
        floor: Best guesses without a gradient by class, (classes, C, H, W) in [0, 1]. One restart
            more of every victim, with the last of the secrets' variants, starts from the guess for
            its label (from their mean where labels are searched); in a batch with a little noise,
            without which images of one class would stay alike for ever.
    """

    name: str  # type: ignore[misc]  # of two parts, so it belongs to the value

    def __init__(
        self, attack: GradientMatching, secrets: AdaptiveSecrets, *, floor: Tensor | None = None
    ) -> None:
        shown = None if floor is None else tuple(floor.shape)
        super().__init__(attack=attack, secrets=secrets, floor=shown)
        self.attack, self.secrets, self.floor = attack, secrets, floor
        self.name = f"{attack.name}+{secrets.label}"

    def reconstruct(
        self,
        observations: Sequence[Observation],
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> list[Reconstruction]:
        """As :meth:`Attack.reconstruct`.

        Raises:
            AttackError: The observations lack what the secrets need, or the floor does not fit.
        """
        guesses = None if self.floor is None else self._guesses(observations, generator)
        variants = self.secrets.variants(_first(observations), generator)
        best: list[Reconstruction] = []
        for number, secrets in enumerate(variants):
            found = self.attack.reconstruct(
                observations,
                generator=generator,
                progress=_part(progress, number, len(variants)),
                secrets=secrets,
                guesses=guesses if number == len(variants) - 1 else None,
                keep_lost=True,
            )
            best = [_better(a, b) for a, b in zip(best or found, found, strict=True)]
        note = f"{self.name}: {self.secrets.words}"
        return [replace(r, notes=(*r.notes, note)) for r in refuse_lost(best)]

    def _guesses(
        self, observations: Sequence[Observation], generator: torch.Generator
    ) -> list[Tensor]:
        floor, first = self.floor, _first(observations)
        assert floor is not None
        if tuple(floor.shape) != (first.num_classes, *first.image_shape):
            raise AttackError(
                f"got a floor of shape {tuple(floor.shape)}, expected one image per class, "
                f"{(first.num_classes, *first.image_shape)}."
            )
        network = Network.of(observations)
        if not self.attack.infers or not tells_labels(first, network):
            mean = floor.mean(dim=0)
            shape = (first.count, first.training.images, *first.image_shape)
            found = [mean.expand(shape)] * len(observations)
        else:
            found = each(observations, lambda o: floor[infer_labels(o, network)])
        if first.training.images == 1:
            return found
        return [x + NOISE * torch.randn(x.shape, generator=generator) for x in found]


def _first(observations: Sequence[Observation]) -> Observation:
    if not observations:
        raise AttackError("got no observation; expected one or more.")
    return observations[0]


def _better(a: Reconstruction, b: Reconstruction) -> Reconstruction:
    return a if a.loss <= b.loss or b.loss != b.loss else b


def _part(progress: Progress | None, number: int, parts: int) -> Progress | None:
    if progress is None:
        return None

    def tell(done: int, total: int, loss: float) -> None:
        progress(number * total + done, parts * total, loss)

    return tell
