"""Settings of a run: frozen dataclasses from a TOML file and flags, echoed into the run folder."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from fedkl.data import DATASETS, PARTITIONS
from fedkl.defenses import DefenseConfig
from fedkl.errors import ConfigError, check_positive, check_size, unknown
from fedkl.federation.optim import OPTIMIZERS, SCHEDULES

METHODS: Final = ("centralized", "fedavg", "fedsgd")
ON_SPENT: Final = ("warn", "error", "renew")
BUDGET: Final = 1
SETTLE_STEPS: Final = 50
"""Presentations under one pad at which our attackers cross 2 %, where guessing finds 1 %."""


def _choice(kind: str, value: str, choices: typing.Iterable[str]) -> None:
    if value not in choices:
        raise ConfigError(unknown(kind, value, choices))


def _at_least(what: str, value: float | None, low: float) -> None:
    if value is not None and not low <= value < math.inf:
        raise ConfigError(f"{what} must be a number of at least {low:g}, got {value}.")


def check_nesterov(nesterov: bool, momentum: float) -> None:
    """Raises where SGD was asked for Nesterov's form of no momentum.

    Raises:
        ConfigError: It was.
    """
    if nesterov and momentum == 0:
        raise ConfigError(
            f"nesterov needs a momentum above 0, got {momentum:g}; set nesterov = false, or raise "
            "momentum."
        )


def _share(what: str, value: float, *, zero: bool) -> None:
    if not (0 <= value <= 1 if zero else 0 < value <= 1):
        raise ConfigError(f"{what} must be {'in [0, 1]' if zero else 'in (0, 1]'}, got {value}.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, in which form, and how they are dealt to the clients.

    ``samples`` is the number of images per client (default: all training images are dealt).
    """

    dataset: str = "fashion-mnist"
    root: str | None = None
    image_size: int = 32
    channels: int = 3
    augment: bool = False
    partition: str = "iid"
    alpha: float = 0.5
    shards_per_client: int = 2
    samples: int | None = None

    def __post_init__(self) -> None:
        _choice("data set", self.dataset, DATASETS)
        _choice("partition", self.partition, PARTITIONS)
        _at_least("image_size", self.image_size, 1)
        _at_least("samples", self.samples, 1)
        _at_least("shards_per_client", self.shards_per_client, 1)
        check_positive("alpha", self.alpha)
        if self.channels not in (1, 3):
            raise ConfigError(f"channels must be 1 or 3, got {self.channels}.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model by name or ``package.module:factory``; ``init`` is a safetensors file."""

    name: str = "lenet"
    init: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What a client does in one round.

    ``local_steps`` replaces ``local_epochs`` where given. ``schedule`` is over rounds: ``step``
    multiplies the rate by ``decay`` at each of ``milestones``, ``cosine`` goes to zero.
    ``update_length``: every update is sent at this L2 norm, times the schedule where weights are
    sent (:func:`fedkl.at_length`); None: as it is. With weight decay on clients their share of it
    tells the size all the same.
    """

    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "constant"
    milestones: tuple[int, ...] = (60, 120, 160)
    decay: float = 0.2
    batch_size: int = 64
    local_epochs: int = 1
    local_steps: int | None = None
    keep_momentum: bool = False
    update_length: float | None = None

    def __post_init__(self) -> None:
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _choice("schedule", self.schedule, SCHEDULES)
        check_positive("lr", self.lr)
        if self.update_length is not None:
            check_positive("update_length", self.update_length)
        _at_least("batch_size", self.batch_size, 1)
        _at_least("local_epochs", self.local_epochs, 1)
        _at_least("local_steps", self.local_steps, 1)
        _at_least("momentum", self.momentum, 0)
        _at_least("weight_decay", self.weight_decay, 0)
        _at_least("decay", self.decay, 0)
        for name in ("momentum", "weight_decay", "decay"):
            check_size(name, getattr(self, name))
        for milestone in self.milestones:
            _at_least("a milestone", milestone, 0)
        if self.schedule == "step":
            self._check_steps()
        if self.optimizer == "sgd":
            check_nesterov(self.nesterov, self.momentum)

    def _check_steps(self) -> None:
        rate = self.lr
        for milestone in sorted(self.milestones):
            rate *= self.decay
            check_size(f"lr after milestone {milestone}", rate)


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """How the clients work together.

    Attributes:
        method: ``centralized`` (one client with everybody's images), ``fedavg`` or ``fedsgd``.
        clients: Number of clients.
        fraction: Share of the clients sampled each round, at least one.
        rounds: Number of rounds (epochs, for ``centralized``).
        weighted: Weight updates by their number of examples; plain mean otherwise, as the
            paper's released code does.
        dropout: Chance that a sampled client never answers in a round.
        min_clients: Updates below which a round fails.
        join_steps: Lock-only steps on a client's own data before it takes part for the first time;
            after an absence as many, but no more than an epoch.
        settle_steps: Lock-only steps, at a tenth of the learning rate, before a client uses a
            global model: what it has in private belongs to the weights that it sent, not to
            everybody's mean. No more than an epoch. None: 50, or 0 with ``seal_private``, where
            nothing needs to settle and steps fit a client to its own labels instead.
        seal_private: Clients that hold one key send each other their private layers encrypted
            under it, by way of the server, and go on from the mean of them.
    """

    method: str = "fedavg"
    clients: int = 3
    fraction: float = 1.0
    rounds: int = 20
    weighted: bool = True
    dropout: float = 0.0
    min_clients: int = 1
    join_steps: int = 10
    settle_steps: int | None = None
    seal_private: bool = False

    def __post_init__(self) -> None:
        _choice("method", self.method, METHODS)
        _at_least("clients", self.clients, 1)
        _at_least("rounds", self.rounds, 1)
        _at_least("min_clients", self.min_clients, 1)
        _at_least("join_steps", self.join_steps, 0)
        if self.settle_steps is None:
            object.__setattr__(self, "settle_steps", 0 if self.seal_private else SETTLE_STEPS)
        _at_least("settle_steps", self.settle_steps, 0)
        _share("fraction", self.fraction, zero=False)
        _share("dropout", self.dropout, zero=True)
        if self.min_clients > self.sampled:
            raise ConfigError(
                f"min_clients is {self.min_clients}, but only {self.sampled} client(s) are sampled "
                "a round; lower min_clients or raise clients or fraction."
            )

    @property
    def sampled(self) -> int:
        """Clients asked in one round."""
        if self.method == "centralized":
            return 1
        return max(1, round(self.clients * self.fraction))


@dataclass(frozen=True, kw_only=True)
class RenewalConfig:
    """How long a pad serves. Only for locks with a pad.

    Attributes:
        budget: Presentations (images × steps) under one pad; None does not count.
        on_spent: What happens when a round would exceed it: ``warn``, ``error`` or ``renew``.
        every: Rounds after which pads are renewed anyhow; 0: never.
        stagger: The clients renew one after the other instead of all in one round.
        steps: Lock-only steps on a client's own data after it renewed its pad.
        keep_learned: Whether what was learned on top of a pad stays when it is renewed.
    """

    budget: int | None = BUDGET
    on_spent: str = "warn"
    every: int = 0
    stagger: bool = False
    steps: int = 10
    keep_learned: bool = False

    def __post_init__(self) -> None:
        _choice("reaction to a spent pad", self.on_spent, ON_SPENT)
        _at_least("budget", self.budget, 1)
        _at_least("every", self.every, 0)
        _at_least("steps", self.steps, 0)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured, and on how much.

    ``every`` 0 evaluates only at the end. ``wrong_keys`` fresh keys are tried per client, on at
    most ``wrong_key_images`` images. The thief re-estimates statistics on ``thief_images``, a
    client those of its private norms on ``calibration_images`` of its own.
    """

    every: int = 5
    clients: int = 3
    images: int = 2_000
    wrong_keys: int = 10
    wrong_key_images: int = 2_000
    thief_images: int = 1_000
    calibration_images: int = 1_000

    def __post_init__(self) -> None:
        _at_least("every", self.every, 0)
        for name in ("clients", "images", "wrong_keys", "wrong_key_images", "calibration_images"):
            _at_least(name, getattr(self, name), 1)
        _at_least("thief_images", self.thief_images, 2)  # of one, statistics cannot be taken


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on, except the keys."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    defense: DefenseConfig = field(default_factory=DefenseConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    renewal: RenewalConfig = field(default_factory=RenewalConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    workers: int = 1
    device: str = "cpu"
    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        _at_least("workers", self.workers, 1)
        _at_least("checkpoint_every", self.checkpoint_every, 1)
        _at_least("seed", self.seed, 0)
        if self.defense.one_key:
            _renewed_together(self)
        elif self.federation.seal_private:
            raise ConfigError(
                "got --seal-private without --one-key: clients open what others sealed with a key "
                "that all of them have. Add --one-key, or leave --seal-private out."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and TOML."""
        return dataclasses.asdict(self)


def _renewed_together(config: RunConfig) -> None:
    """Clients with one key have one pad, which is renewed by the calendar or not at all."""
    renewal = config.renewal
    alone = {
        "--stagger": renewal.every > 0 and renewal.stagger,
        "--on-spent renew": renewal.on_spent == "renew",
    }
    if found := [said for said, is_so in alone.items() if is_so]:
        raise ConfigError(
            f"got --one-key with {' and '.join(found)}, where clients renew their pads at "
            "different times; one key means one pad for all: renew it with --renew-every, or give "
            "clients keys of their own."
        )


def config_from(data: Mapping[str, Any], *, source: str = "the configuration") -> RunConfig:
    """A configuration from plain nested data, such as a parsed TOML file or ``to_dict``.

    Raises:
        ConfigError: An unknown section or setting (with the nearest names), a value of the wrong
            type or out of range; ``source`` is named.
    """
    value = _build(RunConfig, data, source)
    assert isinstance(value, RunConfig)
    return value


def load_config(path: Path) -> dict[str, Any]:
    """The nested settings of a TOML file; pass them to :func:`config_from`.

    Raises:
        ConfigError: The file is missing or not TOML (line and column).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check --config.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}.") from error


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """``section.setting: a → b`` for everything that differs."""
    found = []
    for name, left in _flat(a.to_dict()).items():
        right = _flat(b.to_dict())[name]
        if left != right:
            found.append(f"{name}: {left!r} → {right!r}")
    return found


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _build(kind: type, data: Any, source: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: expected a table of settings, got {data!r}.")
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in data.items():
        if name not in hints:
            raise ConfigError(f"{source}: {unknown('setting', str(name), hints)}")
        where = f"{source}, {name}"
        hint = hints[name]
        values[name] = (
            _build(cast(type, hint), value, where)
            if dataclasses.is_dataclass(hint)
            else _value(hint, value, where)
        )
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    for kind in allowed:
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
            item = typing.get_args(kind)[0]
            return tuple(_value(item, part, f"{where}[{i}]") for i, part in enumerate(value))
        if isinstance(kind, type) and type(value) is kind:
            return value
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
    raise ConfigError(f"{where}: expected {names.replace('NoneType', 'nothing')}, got {value!r}.")
