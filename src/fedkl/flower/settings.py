"""Settings of a Flower run: FedKL's own, and what Flower adds, from Flower's flat run config."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fedkl.defenses import parts_of
from fedkl.errors import ConfigError, unknown
from fedkl.federation import RunConfig, config_from
from fedkl.flower.strategies import STRATEGIES

PROTOCOL: Final = 3
PRIVACY: Final = ("none", "local", "client", "server")
_SECTION: Final = "flower."
# Where each side may differ without the result being another one.
_FREE: Final = ("workers", "device", "checkpoint_every", "federation.rounds", "data.root")


@dataclass(frozen=True, kw_only=True)
class FlowerConfig:
    """What a run on Flower has besides :class:`fedkl.federation.RunConfig`.

    Attributes:
        folder: Run folder of the server; clients keep theirs there too, unless their node config
            names one (``fedkl-folder``).
        timeout: Seconds to wait for the answers of a round, per attempt.
        retries: How often a client that did not answer is asked again in the same round.
        patience: Seconds to wait for a client that was cut off to come back before asking again.
        save_updates: Keep what the server received, round by round, below ``updates/``.
        strategy: Who combines the updates: ``fedkl`` (the in-process engine's own aggregate) or a
            strategy of Flower.
        options: Settings of that strategy, as name and value.
        secagg: Flower's SecAgg+; the server sees the sum of the updates only.
        clipping_range: SecAgg+ cuts every weight's change to this range before it quantizes.
        dp: Differential privacy by Flower: ``none``, ``local`` (clipped and noised on the client),
            ``client`` (clipped there, noised on the server) or ``server`` (both on the server).
        clip: L2 norm to which a client's change of the shared state is clipped.
        noise: Noise multiplier of ``client`` and ``server``.
        epsilon, delta: Budget per round of ``local``.
    """

    folder: str = "runs/flower"
    timeout: float = 3600.0
    retries: int = 1
    patience: float = 120.0
    save_updates: bool = False
    strategy: str = "fedkl"
    options: tuple[tuple[str, Any], ...] = ()
    secagg: bool = False
    clipping_range: float = 4.0
    dp: str = "none"
    clip: float = 1.0
    noise: float = 1.0
    epsilon: float = 1.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(unknown("strategy", self.strategy, STRATEGIES))
        if self.dp not in PRIVACY:
            raise ConfigError(unknown("differential privacy", self.dp, PRIVACY))
        if self.secagg and (self.strategy != "fedkl" or self.dp in ("client", "server")):
            raise ConfigError(
                f"secagg gives the server one sum, got strategy {self.strategy!r} and dp "
                f"{self.dp!r}, which need single updates; use strategy 'fedkl' and dp 'none' or "
                "'local'."
            )
        if self.secagg and self.save_updates:
            raise ConfigError("save_updates has nothing to save under secagg; turn one of them off")
        for name in ("timeout", "clipping_range", "clip", "epsilon", "delta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a positive number, got {getattr(self, name)}.")
        for name in ("retries", "noise", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}.")

    @property
    def packed(self) -> bool:
        """Whether the floats travel as one vector: what Flower's own parts can work with."""
        return self.secagg or self.dp != "none" or self.strategy != "fedkl"


def settings_from(run_config: Mapping[str, Any]) -> tuple[RunConfig, FlowerConfig]:
    """Both configurations from Flower's run config, whose keys are dotted (``training.lr``).

    ``flower.*`` is for :class:`FlowerConfig`, with ``flower.options.*`` for the strategy; all else
    is as in a TOML file of ``fedkl train``. Flower knows no lists: write milestones as "60 120".

    Raises:
        ConfigError: As :func:`fedkl.federation.config_from`.
    """
    nested: dict[str, Any] = {}
    flower: dict[str, Any] = {}
    options: list[tuple[str, Any]] = []
    for key, value in run_config.items():
        if key.startswith(f"{_SECTION}options."):
            options.append((key.removeprefix(f"{_SECTION}options."), value))
        elif key.startswith(_SECTION):
            flower[key.removeprefix(_SECTION)] = value
        else:
            _put(nested, key, value)
    known = {field.name: field for field in dataclasses.fields(FlowerConfig)}
    for name, value in flower.items():
        if name not in known:
            raise ConfigError(f"run config: {unknown('setting', _SECTION + name, known)}")
        flower[name] = _typed(name, value, known[name].default)
    return (
        config_from(nested, source="run config"),
        FlowerConfig(**flower, options=tuple(sorted(options))),
    )


def _put(nested: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    table = nested
    for section in sections:
        table = table.setdefault(section, {})
    if key == "training.milestones" and isinstance(value, str):
        value = [int(part) for part in value.replace(",", " ").split()]
    table[name] = value


def _typed(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ConfigError(
            f"run config, {_SECTION}{name}: expected {type(default).__name__}, got {value!r}."
        )
    return value


def check_together(config: RunConfig, flower: FlowerConfig) -> None:
    """Raises unless ``config`` and ``flower`` can be had together.

    Raises:
        ConfigError: Private layers would leave a client without the noise that is accounted for, or
            the noise would be drawn from a seed that the server has.
    """
    if "noise" in parts_of(config.defense.name):
        raise ConfigError(
            f"got defense {config.defense.name!r} over Flower: its noise follows from the run's "
            "seed, which the server sends, so it could be subtracted. Leave noise out, and let "
            "Flower clip and noise on the client: flower.dp = 'local' with flower.clip and "
            "flower.epsilon (docs/flower.md)."
        )
    if config.federation.seal_private and flower.dp != "none":
        raise ConfigError(
            f"got federation.seal_private with flower.dp {flower.dp!r}, whose guarantee is for "
            "what is shared: sealed private layers reach other clients without noise. Turn one of "
            "them off."
        )


def digest(config: RunConfig, flower: FlowerConfig) -> str:
    """What both sides must agree on, as 16 hex digits."""
    facts = config.to_dict()
    for key in _FREE:
        section, _, name = key.rpartition(".")
        (facts[section] if section else facts).pop(name)
    if config.training.schedule == "cosine":  # whose every rate depends on the number of rounds
        facts["rounds"] = config.federation.rounds
    facts["flower"] = [flower.secagg, flower.dp, flower.clip, flower.epsilon]
    text = json.dumps([PROTOCOL, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
