"""What a client does to protect itself: hooks along its data path, identity by default."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fedkl.key import Key
from fedkl.locking import Layers, Scheme, lock


class Defense(ABC):
    """A defense is a value. Order of the hooks: ``prepare``, training with ``step``, ``share``.

    ``share`` sees an update from which everything private has been stripped already.
    """

    name: str
    keyed: bool = False

    def prepare(self, model: nn.Module, key: Key | None, example: Any) -> nn.Module:
        """The model the client trains (the argument itself or a copy)."""
        return model

    def step(self, gradients: Sequence[Tensor]) -> None:  # noqa: B027 - a hook
        """Called with the gradients before every optimizer step; may change them in place."""

    def share(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What leaves the client in place of ``update``."""
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
    """Several defenses one after the other, written ``a+b``."""

    def __init__(self, parts: Sequence[Defense]) -> None:
        self.parts = tuple(parts)
        self.name = "+".join(part.name for part in parts)
        self.keyed = any(part.keyed for part in parts)

    def prepare(self, model: nn.Module, key: Key | None, example: Any) -> nn.Module:
        """Every part's ``prepare`` in order."""
        for part in self.parts:
            model = part.prepare(model, key, example)
        return model

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Every part's ``step`` in order."""
        for part in self.parts:
            part.step(gradients)

    def share(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every part's ``share`` in order."""
        for part in self.parts:
            update = part.share(update)
        return dict(update)

    def receive(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every part's ``receive``, in the opposite order of ``share``."""
        for part in reversed(self.parts):
            state = part.receive(state)
        return dict(state)

    def __repr__(self) -> str:
        return f"Composed({list(self.parts)!r})"
