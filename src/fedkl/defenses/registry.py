"""The defenses by name, and their settings as plain data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedkl.defenses.base import Composed, Defense, LockDefense, NoDefense
from fedkl.defenses.noise import Noise
from fedkl.defenses.prune import Prune
from fedkl.errors import ConfigError, unknown
from fedkl.locking import PRESETS, scheme_of


@dataclass(frozen=True, kw_only=True)
class DefenseConfig:
    """Which defense, and how it is set.

    Attributes:
        name: ``none``, ``norm``, ``fedbn``, ``channel``, ``pad``, ``open-pad``, ``noise``,
            ``prune``, or several joined by ``+``, which do to an update what they do in that order.
        preset: ``paper`` or ``paper-sigmoid`` for ``channel``; settings given beside it win.
        layers: ``first``, ``all``, a module's name or a regular expression.
        behind: Module behind which the first lock stands; of ``layers`` those count that run later.
        norm: Norm inserted where there is none: ``batch``, ``group`` or ``instance``.
        share_statistics: Share the running statistics of locked norms, as the released code does.
        group_key: Locks of all clients start at the same γ and β, drawn from a key that the clients
            share and the server does not have. Not for the paper's presets.
        one_key: All clients hold one and the same key, which keeps out the server alone: whoever
            has it sees through every client's lock.
        spread, gain: Of ``channel`` and ``pad``.
        shift_spread, activation, bias, law, length, chain: Further settings of ``channel``;
            None is its (or the preset's) default.
        inner_spread, scale_law, inner_scale_law, learned: Further settings of ``pad``; None is its
            default.
        stem, head, lock_head_input, max_length: Of ``pad`` and ``open-pad``; None is the default.
        clip, noise_multiplier: Of ``noise``: an L2 norm above 0 (default 2.5), and the deviation of
            the noise in units of it, from 0 (default 0.001).
        prune_ratio: Of ``prune``: the share of entries removed, in [0, 1) (default 0.9).
    """

    name: str = "none"
    preset: str | None = None
    layers: str = "all"
    behind: str | None = None
    norm: str = "batch"
    share_statistics: bool = False
    group_key: bool = True
    one_key: bool = False
    spread: float | None = None
    gain: float | None = None
    shift_spread: float | None = None
    activation: str | None = None
    bias: bool | None = None
    law: str | None = None
    length: int | None = None
    chain: bool | None = None
    inner_spread: float | None = None
    scale_law: str | None = None
    inner_scale_law: str | None = None
    learned: str | None = None
    stem: bool | None = None
    head: bool | None = None
    lock_head_input: bool | None = None
    max_length: int | None = None
    clip: float | None = None
    noise_multiplier: float | None = None
    prune_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ConfigError(unknown("preset", self.preset, PRESETS))
        _noise(self)  # whatever the name: an audit gives it one of several later
        _prune(self)
        make_defense(self)


_LAYERS: Final = ("stem", "head", "lock_head_input", "max_length")
_SETTINGS: Final[Mapping[str, Sequence[str]]] = {
    "channel": (
        "spread",
        "shift_spread",
        "gain",
        "activation",
        "bias",
        "law",
        "length",
        "chain",
    ),
    "pad": (
        "spread",
        "inner_spread",
        "scale_law",
        "inner_scale_law",
        "learned",
        "gain",
        *_LAYERS,
    ),
    "open-pad": _LAYERS,
    "noise": ("clip", "noise_multiplier"),
    "prune": ("prune_ratio",),
}


def _given(config: DefenseConfig, name: str) -> dict[str, Any]:
    """The settings of that defense that are not left to their defaults."""
    given = {field: getattr(config, field) for field in _SETTINGS.get(name, ())}
    return {field: value for field, value in given.items() if value is not None}


def _noise(config: DefenseConfig) -> Defense:
    return Noise(**_given(config, "noise"))


def _prune(config: DefenseConfig) -> Defense:
    return Prune(**_given(config, "prune"))


def _lock(config: DefenseConfig, name: str) -> Defense:
    settings = _given(config, name)
    if name == "channel":
        name = config.preset or name
    return LockDefense(
        scheme_of(name, **settings),
        layers=config.layers,
        behind=config.behind,
        norm=config.norm,
        share_statistics=config.share_statistics,
    )


DEFENSES: Final[Mapping[str, Callable[[DefenseConfig], Defense]]] = {
    "none": lambda config: NoDefense(),
    "norm": lambda config: _lock(config, "norm"),
    "fedbn": lambda config: _lock(config, "fedbn"),
    "channel": lambda config: _lock(config, "channel"),
    "pad": lambda config: _lock(config, "pad"),
    "open-pad": lambda config: _lock(config, "open-pad"),
    "noise": _noise,
    "prune": _prune,
}


def parts_of(name: str) -> list[str]:
    """The names that are joined by ``+`` in that of a defense, in their order."""
    return re.split(r"\s*\+\s*", name)


def make_defense(config: DefenseConfig) -> Defense:
    """The defense that ``config`` describes.

    Raises:
        ConfigError: An unknown name or setting, or two locks, or twice the same in one composition.
    """
    names = parts_of(config.name)
    for name in names:
        if name not in DEFENSES:
            raise ConfigError(unknown("defense", name, DEFENSES))
    parts = [DEFENSES[name](config) for name in names]
    locks = [n for n, part in zip(names, parts, strict=True) if isinstance(part, LockDefense)]
    if len(locks) > 1:
        raise ConfigError(
            f"defense {config.name!r} has two locks; a model carries one: "
            f"keep one of {', '.join(locks)}."
        )
    if twice := [name for name in ("noise", "prune") if names.count(name) > 1]:
        raise ConfigError(
            f"defense {config.name!r} has {twice[0]} more than once, and settings for one; keep "
            "one of them."
        )
    return parts[0] if len(parts) == 1 else Composed(parts)
