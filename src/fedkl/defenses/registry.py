"""The defenses by name, and their settings as plain data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedkl.defenses.base import Composed, Defense, LockDefense, NoDefense
from fedkl.errors import ConfigError, unknown
from fedkl.locking import PRESETS, scheme_of


@dataclass(frozen=True, kw_only=True)
class DefenseConfig:
    """Which defense, and how it is set.

    Attributes:
        name: ``none``, ``norm``, ``fedbn``, ``channel``, ``pad``, ``open-pad``, or several joined
            by ``+``.
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

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ConfigError(unknown("preset", self.preset, PRESETS))
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
}


def _lock(config: DefenseConfig, name: str) -> Defense:
    given = {field: getattr(config, field) for field in _SETTINGS.get(name, ())}
    settings: dict[str, Any] = {f: value for f, value in given.items() if value is not None}
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
}


def make_defense(config: DefenseConfig) -> Defense:
    """The defense that ``config`` describes.

    Raises:
        ConfigError: An unknown name or setting, or two locks in one composition.
    """
    names = re.split(r"\s*\+\s*", config.name)
    for name in names:
        if name not in DEFENSES:
            raise ConfigError(unknown("defense", name, DEFENSES))
    parts = [DEFENSES[name](config) for name in names]
    if sum(isinstance(part, LockDefense) for part in parts) > 1:
        raise ConfigError(
            f"defense {config.name!r} has two locks; a model carries one: "
            f"keep one of {', '.join(n for n in DEFENSES if n != 'none')}."
        )
    return parts[0] if len(parts) == 1 else Composed(parts)
