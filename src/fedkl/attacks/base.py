"""What an attack is and what it gives back."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from fedkl.errors import AttackError, ConfigError, unknown
from fedkl.observation import Observation

Found = TypeVar("Found")

Progress = Callable[[int, int, float], None]
"""Called with (iterations done, iterations in all, mean of the best losses so far)."""

Together = Callable[[Sequence[Tensor], Tensor], list[Tensor]]
"""Called with the candidates of every image, each (K, C, H, W), and their classes, int64 (N,)."""


@dataclass(frozen=True)
class Reconstruction:
    """What an attack makes of one observation.

    Attributes:
        images: float32 (T, images, C, H, W) in [0, 1]: one set per update.
        labels: int64 (T, images): inferred, searched or given.
        loss: The attack's own loss of the restart it chose; nan if it has none.
        losses: Best loss so far at ``iterations``, for curves.
        iterations: Iteration numbers of ``losses`` and of ``frames``.
        frames: The first image of the first update over time, float32 (frames, C, H, W).
        restarts: Trials started over because their loss was not finite.
        notes: What a reader has to know.
        score: Called with the number of an update and candidates (K, C, H, W) in [0, 1], all of the
            label found, says how well each fits that update, (K,), the higher the better. None:
            whoever has candidates compares them with ``images``.
        together: The same for all images of all updates of all victims of the call at once, in
            their order: from the candidates of each, and the class these are of, the scores of
            each. An attack that learns from everybody's candidates finds more so, and of updates
            of several images there is no other way to ask. None: it does not. All victims have the
            same.
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    loss: float = float("nan")
    losses: tuple[float, ...] = ()
    iterations: tuple[int, ...] = ()
    frames: Tensor | None = field(default=None, repr=False)
    restarts: int = 0
    notes: tuple[str, ...] = ()
    score: Callable[[int, Tensor], Tensor] | None = field(default=None, repr=False)
    together: Together | None = field(default=None, repr=False)


class Attack(ABC):
    """Turns observations into images and labels. Hyper-parameters in the constructor, data at call.

    An attack chooses among its trials by its own loss; it never sees the truth. Its ``repr`` tells
    every setting.
    """

    name: ClassVar[str]

    def __new__(cls, *_: Any, **settings: Any) -> Self:
        """Looks at the names of ``settings`` before the constructor gets them.

        Raises:
            ConfigError: It does not know one of them; with those that it knows.
        """
        taken = [*inspect.signature(cls.__init__).parameters.values()][1:]
        known = [one.name for one in taken]
        if not any(one.kind is one.VAR_KEYWORD for one in taken):
            for name in sorted(settings.keys() - known):
                raise ConfigError(_unknown_setting(cls.__name__, name, known))
        return super().__new__(cls)

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def reconstruct(
        self,
        observations: Sequence[Observation],
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> list[Reconstruction]:
        """One reconstruction per observation.

        Args:
            observations: Victims of one model, one kind of training and one number of updates:
                they differ in their changes (and granted secrets and labels) alone.
            generator: All randomness of the attack: the same generator gives the same images.
            progress: Told now and then how far it is.

        Raises:
            AttackError: The attack cannot be mounted on these observations; where single ones are
                at fault, its ``victims`` says which.
        """

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{type(self).__name__}({settings})"


def _unknown_setting(attack: str, name: str, known: Sequence[str]) -> str:
    if not known:
        return f"got the setting {name!r} of {attack}, which has none; leave it out."
    return unknown(f"setting of {attack}", name, known)


def each(observations: Sequence[Observation], look: Callable[[Observation], Found]) -> list[Found]:
    """What ``look`` finds in every victim.

    Raises:
        AttackError: It fails on some; all of them are named in ``victims``, each with its own
            message, so that whoever called can leave them out at once. The message is the first
            one's.
    """
    found: list[Found] = []
    failed: dict[int, str] = {}
    for place, observation in enumerate(observations):
        try:
            found.append(look(observation))
        except AttackError as error:
            failed[place] = str(error)
    if failed:
        raise AttackError(next(iter(failed.values())), failed)
    return found
