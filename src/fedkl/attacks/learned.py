"""What a client's optimizer moves where γ and β are computed from other parameters.

A step of SGD on W moves γ = act(W u) by lr·‖u‖²·act′² times the gradient by γ, and one on what is
learned on top of a pad by lr·gain². All of that is in the public lock spec, so whoever repeats a
client's steps can take them in the client's own coordinates, momentum and weight decay included.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]

_EDGE: Final = 1e-6  # how near to its bounds an activation is still undone
_SIZES: Final = {"sign": 1.0, "normal": 1.0, "uniform": 1 / 3}  # mean square of a key's entries
# By name: the activation, and what undoes it.
_ACTIVATIONS: Final[Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]] = {
    "identity": (lambda z: z, lambda value: value),
    "relu": (torch.relu, lambda value: value),
    "sigmoid": (torch.sigmoid, lambda value: torch.logit(value, eps=_EDGE)),
    "tanh": (torch.tanh, lambda value: torch.atanh(value.clamp(-1 + _EDGE, 1 - _EDGE))),
}


class Learned(ABC):
    """One γ or β of a lock."""

    @abstractmethod
    def start(self, secrets: Tensors, name: str) -> Tensor:
        """What the optimizer holds before the first step."""

    @abstractmethod
    def value(self, learned: Tensor, secrets: Tensors, name: str) -> Tensor:
        """γ or β once that has moved; ``secrets`` are those before the first step."""


@dataclass(frozen=True)
class Mapped(Learned):
    """act(W u): ``learned`` is W's part along u, of length ‖u‖.

    Exact for the identity. Another activation is undone, which fails where it is flat; a chained
    lock is taken to hear the lock before it as it was, not as its steps have moved it.

    Attributes:
        length: ‖u‖ of a key vector by its law: exact for signs, to 3 % for 1024 others.
        bias: Whether the map has a bias, which moves along.
        activation: Its name.
        before: Of a chained lock, the γ or β it is fed by, times ``length``.
    """

    length: float
    bias: bool
    activation: str
    before: str | None = None

    def _slope(self, secrets: Tensors) -> Tensor | float:
        if self.before is None:
            return math.sqrt(self.length**2 + self.bias)
        size = self.length**2 * secrets[self.before].square().sum()
        return (size + float(self.bias) + _EDGE**2).sqrt()

    def start(self, secrets: Tensors, name: str) -> Tensor:
        return _ACTIVATIONS[self.activation][1](secrets[name]) / self._slope(secrets)

    def value(self, learned: Tensor, secrets: Tensors, name: str) -> Tensor:
        act, slope = _ACTIVATIONS[self.activation][0], self._slope(secrets)
        # Where the activation could not be undone, the change is right and the value stays.
        missed = secrets[name] - act(self.start(secrets, name) * slope)
        return act(learned * slope) + missed


@dataclass(frozen=True)
class OnTop(Learned):
    """pad + gain·learned. The part learned before is unknown and taken to be zero.

    Only weight decay hears of that part: it pulls at nothing here until the first step.

    Attributes:
        gain: What is learned is multiplied by it.
        shape: Of what is learned, broadcasting over the positions; None: nothing is.
    """

    gain: float
    shape: tuple[int, ...] | None

    def start(self, secrets: Tensors, name: str) -> Tensor:
        own = secrets[name]
        return own.new_zeros(() if self.shape is None else self.shape)

    def value(self, learned: Tensor, secrets: Tensors, name: str) -> Tensor:
        if self.shape is None:
            return secrets[name]
        return secrets[name] + self.gain * learned


def learned_of(spec: Mapping[str, Any] | None, model: nn.Module) -> dict[str, Learned]:
    """By name, every γ and β of a rebuilt model that clients do not learn as they are.

    Args:
        spec: The lock spec as plain data; None without a lock.
        model: The public model.
    """
    if spec is None or spec["scheme"] not in ("channel", "pad"):
        return {}
    found: dict[str, Learned] = {}
    before: tuple[str, int] | None = None
    for site in spec["sites"]:
        name = str(site["name"])
        for kind in ("gamma", "beta"):
            of = f"{name}.keylock.{kind}"
            if spec["scheme"] == "channel":
                found[of] = _mapped(spec["settings"], before, kind)
            else:
                shape = tuple(int(size) for size in site["shape"])
                found[of] = _on_top(spec["settings"], shape, model.get_submodule(name))
        before = name, math.prod(site["shape"])
    return found


def _mapped(settings: Mapping[str, Any], before: tuple[str, int] | None, kind: str) -> Mapped:
    chained = before if settings["chain"] else None
    inputs = settings["length"] if chained is None else chained[1]
    factor = 1.0 if settings["spread"] is None else settings["gain"] / math.sqrt(inputs)
    length = factor if chained else factor * math.sqrt(inputs * _SIZES[settings["law"]])
    of = None if chained is None else f"{chained[0]}.keylock.{kind}"
    return Mapped(float(length), bool(settings["bias"]), settings["activation"], of)


def _on_top(settings: Mapping[str, Any], shape: tuple[int, ...], norm: nn.Module) -> OnTop:
    own = _affine_shape(norm, shape)
    if settings["learned"] == "none":
        return OnTop(0.0, None)
    if settings["learned"] == "position":
        positions = math.prod(shape) / math.prod(own)
        return OnTop(settings["gain"] * math.sqrt(max(1.0, positions)), shape)
    last = shape[len(shape) - len(own) :] == own and len(own) < len(shape)
    return OnTop(settings["gain"], own if last else own + (1,) * (len(shape) - len(own)))


def _affine_shape(norm: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the norm's own affine, one entry per channel."""
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        return tuple(norm.normalized_shape)
    return (int(getattr(norm, "num_features", getattr(norm, "num_channels", shape[0]))),)
