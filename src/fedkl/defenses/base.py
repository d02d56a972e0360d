"""What a client does to protect itself: hooks along its data path, identity by default."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedkl.key import Key
from fedkl.locking import Layers, Scheme, lock


@dataclass(frozen=True)
class Sending:
    """What a defense is told of an update that is about to leave.

    Attributes:
        received: The global state that training began with, if the update is weights; None: it is
            a gradient.
        names: Names of the model's parameters, in its order, each once; all else in an update is
            buffers, or a parameter under a second name, which gets the value of the first.
        generator: That of the client's round, after training.
    """

    received: Mapping[str, Tensor] | None
    names: Sequence[str]
    generator: torch.Generator

    def start(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the parameters of ``update`` moved from, in the model's order: zero, of gradients.

        Args:
            update: By name, parameters and buffers.
        """
        here = [n for n in self.names if n in update and update[n].is_floating_point()]
        if self.received is None:
            return {name: torch.zeros_like(update[name]) for name in here}
        return {name: self.received[name] for name in here}


class Defense(ABC):
    """A defense is a value. Order of the hooks: ``prepare``, training with ``step``, ``share``.

    ``share`` sees an update from which everything private has been stripped already.
    """

    name: str
    keyed: bool = False

    @property
    def known(self) -> dict[str, Any]:
        """What ``share`` does to updates, as fields of :class:`fedkl.observation.Training`.

        Public, as the whole scheme is; nothing if it leaves them as they are.
        """
        return {}

    def prepare(self, model: nn.Module, key: Key | None, example: Any) -> nn.Module:
        """The model the client trains (the argument itself or a copy)."""
        return model

    def step(self, gradients: Sequence[Tensor]) -> None:  # noqa: B027 - a hook
        """Called with the gradients before every optimizer step; may change them in place."""

    def share(self, update: Mapping[str, Tensor], sending: Sending) -> dict[str, Tensor]:
        """What leaves the client in place of ``update``.

        Args:
            update: By name: weights after training or a gradient, and buffers.
            sending: Which of it are parameters, and where they moved from.
        """
        return dict(update)

    def receive(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the client takes for the global state it received."""
        return dict(state)


class NoDefense(Defense):
    """Everything is shared."""

    name = "none"

    def __repr__(self) -> str:
        return "NoDefense()"


class LockDefense(Defense):
    """A locking scheme as a defense, the controls ``norm`` and ``fedbn`` included.

    Args:
        scheme: The scheme with its settings.
        layers, behind: As in :func:`fedkl.lock`.
        norm: Kind of norm inserted where there is none.
        share_statistics: Whether running statistics of locked norms are shared.
    """

    def __init__(
        self,
        scheme: Scheme,
        *,
        layers: Layers = "all",
        behind: str | None = None,
        norm: str = "batch",
        share_statistics: bool = False,
    ) -> None:
        self.name = scheme.name
        self.keyed = scheme.keyed
        self.scheme = scheme
        self.layers = layers
        self.behind = behind
        self.norm = norm
        self.share_statistics = share_statistics

    def prepare(self, model: nn.Module, key: Key | None, example: Any) -> nn.Module:
        """A locked copy of ``model``; raises as :func:`fedkl.lock`."""
        return lock(
            model,
            key,
            scheme=self.scheme,
            layers=self.layers,
            behind=self.behind,
            example=example,
            norm=self.norm,
            share_statistics=self.share_statistics,
        )

    def __repr__(self) -> str:
        return (
            f"LockDefense({self.scheme!r}, layers={self.layers!r}, behind={self.behind!r}, "
            f"norm={self.norm!r}, share_statistics={self.share_statistics})"
        )


class Composed(Defense):
    """Several defenses one after the other, written ``a+b``: what ``a`` made, ``b`` gets."""

    def __init__(self, parts: Sequence[Defense]) -> None:
        self.parts = tuple(parts)
        self.name = "+".join(part.name for part in parts)
        self.keyed = any(part.keyed for part in parts)

    @property
    def known(self) -> dict[str, Any]:
        """What is known of all parts, and whether an update is clipped before it is pruned."""
        found: dict[str, Any] = {}
        for part in self.parts:
            before = "clip" in found and "prune_ratio" in part.known
            found |= part.known | ({"clip_first": True} if before else {})
        return found

    def prepare(self, model: nn.Module, key: Key | None, example: Any) -> nn.Module:
        """Every part's ``prepare`` in order."""
        for part in self.parts:
            model = part.prepare(model, key, example)
        return model

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Every part's ``step`` in order."""
        for part in self.parts:
            part.step(gradients)

    def share(self, update: Mapping[str, Tensor], sending: Sending) -> dict[str, Tensor]:
        """Every part's ``share`` in order."""
        for part in self.parts:
            update = part.share(update, sending)
        return dict(update)

    def receive(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every part's ``receive``, in the opposite order of ``share``."""
        for part in reversed(self.parts):
            state = part.receive(state)
        return dict(state)

    def __repr__(self) -> str:
        return f"Composed({list(self.parts)!r})"
