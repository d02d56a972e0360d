"""The schemes by name: the shared norm, the private norm, and the paper's lock; the pad."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final

import torch
from torch import nn

from fedkl.errors import ConfigError, LockError, check_positive, check_size, unknown
from fedkl.key import MAX_VECTOR, Key, KeyStream
from fedkl.locking.pad import OpenPad, Pad
from fedkl.locking.scheme import Scheme, Site
from fedkl.locking.sources import ACTIVATIONS, AffineSource, KeyedAffine, PrivateAffine

KEY_LAWS: Final = ("sign", "uniform", "normal")


@dataclass(frozen=True, kw_only=True)
class SharedNorm(Scheme):
    """The ordinary norm a lock would stand on, γ and β shared: the control ``norm``."""

    name: ClassVar[str] = "norm"
    private: ClassVar[bool] = False

    def source(self, site: Site, key: Key | None) -> AffineSource | None:
        return None

    def rebuilt(self) -> Scheme:
        """Itself: nothing of it is secret."""
        return self


@dataclass(frozen=True, kw_only=True)
class PrivateNorm(Scheme):
    """Private, learned, keyless γ and β: the control ``fedbn`` (FedBN, Li et al. 2021)."""

    name: ClassVar[str] = "fedbn"

    def source(self, site: Site, key: Key | None) -> AffineSource:
        return PrivateAffine(site.scale, site.shift)

    def rebuilt(self) -> Scheme:
        """Itself: its secrets are ordinary parameters."""
        return self


@dataclass(frozen=True, kw_only=True)
class Channel(Scheme):
    """The paper's lock: one γ and one β per channel, computed from the key.

    Args:
        spread: Standard deviation of γ and β at the start (identity activation). Weights are
            N(0, spread²) and the key vector is scaled by 1/√length. None: the initialization of
            ``nn.Linear`` and an unscaled key, as in the paper's released code.
        shift_spread: The same for β alone; None takes ``spread``. A wide β saturates channels.
        gain: How much faster γ and β learn than an ordinary affine would: a gradient step on W
            moves them by lr·gain². Start and spread do not depend on it. Only with ``spread``.
        activation: ``identity``, ``relu``, ``sigmoid`` or ``tanh``.
        bias: Whether the two maps have a bias.
        law: Law of the key vector: ``sign``, ``uniform`` or ``normal``.
        length: Length of the key vector (1024 in the paper).
        chain: Whether every later lock is fed by the γ and β of the one before.
    """

    name: ClassVar[str] = "channel"
    keyed: ClassVar[bool] = True

    spread: float | None = 1.0
    shift_spread: float | None = 0.3
    gain: float = 3.0
    activation: str = "identity"
    bias: bool = False
    law: str = "sign"
    length: int = 1024
    chain: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ConfigError(unknown("activation", self.activation, ACTIVATIONS))
        if self.law not in KEY_LAWS:
            raise ConfigError(unknown("key law", self.law, KEY_LAWS))
        if self.length < 1:
            raise ConfigError(f"key length must be at least 1, got {self.length}.")
        if self.length > MAX_VECTOR:
            raise ConfigError(f"key length must be at most {MAX_VECTOR}, got {self.length}.")
        check_positive("gain", self.gain)
        if self.shift_spread is not None and not (0 <= self.shift_spread < math.inf):
            raise ConfigError(f"shift_spread must be a number from 0, got {self.shift_spread}.")
        check_size("shift_spread", self.shift_spread or 0.0)
        if self.spread is None and self.shift_spread is not None:
            raise ConfigError(
                "shift_spread needs a spread; without one both start as nn.Linear does. "
                "Set shift_spread to None too."
            )
        if self.spread is not None:
            check_positive("spread", self.spread)

    def source(self, site: Site, key: Key | None) -> AffineSource:
        if key is None:
            raise LockError("scheme 'channel' needs a key, got none: pass Key.generate().")
        before = site.previous if self.chain else None
        before = before if isinstance(before, KeyedAffine) else None
        inputs = math.prod(before.shape) if before else self.length
        source = KeyedAffine(
            tuple(site.scale.shape),
            inputs,
            factor=1.0 if self.spread is None else self.gain * inputs**-0.5,
            bias=self.bias,
            activation=self.activation,
            key_vector=None if before else key.vector(self.length, self.law),
            previous=before,
        )
        self.initialize(source, key.stream(site.name), chained=before is not None)
        return source.to(site.scale.device, site.scale.dtype)

    def initialize(self, source: KeyedAffine, stream: KeyStream, *, chained: bool) -> None:
        """Lock weights start from the key: nobody else can redo the draw."""
        with torch.no_grad():
            shift = self.spread if self.shift_spread is None else self.shift_spread
            for parameter, spread in (
                (source.scale_weight, self.spread),
                (source.shift_weight, shift),
            ):
                if spread is None:
                    _uniform(parameter, stream)
                else:
                    # Along a chain the spread is handed on; multiplying again would compound it.
                    # Float32 until the copy: a bfloat16 lock restarts as it started.
                    start = (1.0 if chained else spread) / self.gain
                    parameter.copy_(stream.normal(tuple(parameter.shape)) * start)
            for bias in (source.scale_bias, source.shift_bias):
                if bias is not None and self.spread is None:
                    _uniform(bias, stream, source.scale_weight.shape[1])
                elif bias is not None:
                    bias.zero_()

    def rebuilt(self) -> Scheme:
        """Private γ and β."""
        return PrivateNorm()

    @property
    def takes_group(self) -> bool:
        """Only where γ = W u, which can be given any value by one rank-one change of W.

        And only for key vectors of mean zero: two of U(0, 1) have a cosine of 0.75, so that the
        change would be heard under every key.
        """
        linear = self.activation == "identity" and not self.bias
        return linear and self.spread is not None and self.law != "uniform"

    def agree(self, source: KeyedAffine, stream: KeyStream) -> None:
        """Makes an initialized lock start at the γ and β that ``stream`` says (in place).

        W becomes W + (start − W u)·uᵀ/‖u‖²: with its own key the lock starts at γ = ±spread and
        β ~ N(0, shift_spread²), the same for every client of the group; under any other key W is
        as random as before.
        """
        assert self.spread is not None
        shape = (source.scale_weight.shape[0],)
        shift = self.spread if self.shift_spread is None else self.shift_spread
        starts = (stream.signs(shape) * self.spread, stream.normal(shape) * shift)
        with torch.no_grad():
            weights = (source.scale_weight, source.shift_weight)
            for weight, u, start in zip(weights, source.inputs(), starts, strict=True):
                u = u.to(weight.device)
                missing = start.to(weight.device, weight.dtype) - torch.mv(weight, u)
                # A chain of shifts that start at zero has u = 0, and nothing is missing.
                size = u.square().sum().clamp_min(torch.finfo(u.dtype).tiny)
                weight.add_(torch.outer(missing, u / size))


def _uniform(parameter: nn.Parameter, stream: KeyStream, inputs: int | None = None) -> None:
    """nn.Linear's initialization, U(-1/√inputs, 1/√inputs), from a key stream."""
    bound = (inputs or parameter.shape[-1]) ** -0.5
    parameter.copy_((stream.uniform(tuple(parameter.shape)) * 2 - 1) * bound)


SCHEMES: Final[Mapping[str, type[Scheme]]] = {
    "channel": Channel,
    "fedbn": PrivateNorm,
    "norm": SharedNorm,
    "open-pad": OpenPad,
    "pad": Pad,
}

_PAPER: Final[dict[str, Any]] = {
    "spread": None,
    "shift_spread": None,
    "gain": 1.0,
    "bias": True,
    "law": "uniform",
    "chain": True,
}
PRESETS: Final[Mapping[str, Scheme]] = {
    "paper": Channel(activation="relu", **_PAPER),
    "paper-sigmoid": Channel(activation="sigmoid", **_PAPER),
}


def scheme_of(scheme: str | Scheme, /, **settings: Any) -> Scheme:
    """A scheme from its name, a preset's name, or itself.

    Raises:
        ConfigError: The name or a setting is unknown, with the nearest names; settings come with a
            scheme that has its own; or ``scheme`` is neither a name nor a scheme.
    """
    if isinstance(scheme, Scheme):
        if settings:
            raise ConfigError(
                f"{scheme!r} has its settings already, got {', '.join(sorted(settings))} as well; "
                f"put them into it, or name it: scheme={scheme.name!r}."
            )
        return scheme
    if not isinstance(scheme, str):
        if isinstance(scheme, type) and issubclass(scheme, Scheme):
            name = scheme.__name__
            raise ConfigError(f"scheme got the class {name}, expected a value: {name}().")
        raise ConfigError(
            f"scheme must be a name or a Scheme, got {type(scheme).__name__}; choose one of "
            f"{', '.join([*SCHEMES, *PRESETS])}."
        )
    if scheme in PRESETS:
        preset = PRESETS[scheme]
        kind, values = type(preset), {**preset.settings(), **settings}
    elif scheme in SCHEMES:
        kind, values = SCHEMES[scheme], settings
    else:
        raise ConfigError(unknown("scheme", scheme, [*SCHEMES, *PRESETS]))
    known = {field.name for field in fields(kind)}
    for name in values:
        if name not in known:
            raise ConfigError(unknown(f"setting of scheme {scheme!r}", name, known))
    return kind(**values)
