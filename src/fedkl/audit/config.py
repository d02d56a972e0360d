"""Settings of an audit: what is attacked, by whom, and how hard."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fedkl.attacks import ATTACKS, EFFORTS, SEARCHING
from fedkl.defenses import DEFENSES
from fedkl.errors import ConfigError, number_of, unknown
from fedkl.federation import RunConfig
from fedkl.observation import THREATS

STAGES: Final = ("initial", "mid", "final")
CONTROLS: Final = ("none", "norm", "fedbn")
KEY_HOLDER: Final = "key-shared"
ALIKE: Final = ("adaptive", "key-unknown", "key-regressed", "lock-gradient", "block-ignored")
"""Threat models that are one to attacks without an optimizer: these take neither lock weights nor
lock gradients, and compare no gradients of which some could be left out."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """A grid: attacks x defenses x threats x stages x seeds, on the same images.

    Attributes:
        run: The federation whose updates are attacked; its defense is replaced by each of
            ``defenses`` in turn.
        defenses: Names; the controls ``none``, ``norm`` and ``fedbn`` are added.
        attacks: Names in :data:`fedkl.attacks.ATTACKS`.
        threats: Names in :data:`fedkl.observation.THREATS`; ``key-shared`` is added as a control.
        stage: ``initial``, ``mid`` or ``final``: which global model the victims start from.
        images: Victims.
        batch_size, local_steps: How an update is made. 1 and 1, the worst case, is one gradient.
        observations: Updates that the attacker pools under one lock.
        aggregated: Clients whose updates are averaged before the server sees them, as secure
            aggregation does it.
        seeds: Federations, each with keys and attacks of its own.
        effort: ``quick``, ``standard`` or ``paper``.
        iterations: Of attacks that search, in place of those of the effort.
        parallel: Trials of such attacks that run as one batch, in place of the attack's own number:
            fewer take less memory.
        candidates: Images of the same class among which the true one is to be found.
        pictured: Victims of the first seed whose pictures are kept.
        certificate: Whether directions and bits are counted for one image per defense; of one
            client's update, so ``aggregated`` is 1.
    """

    run: RunConfig = field(default_factory=RunConfig)
    defenses: tuple[str, ...] = ("none", "norm", "fedbn", "channel", "pad")
    attacks: tuple[str, ...] = (
        "inverting-gradients",
        "shadow-label",
        "replay",
        "replay-relations",
    )
    threats: tuple[str, ...] = ("adaptive",)
    stage: str = "final"
    images: int = 20
    batch_size: int = 1
    local_steps: int = 1
    observations: int = 1
    aggregated: int = 1
    seeds: int = 1
    effort: str = "standard"
    iterations: int | None = None
    parallel: int | None = None
    candidates: int = 100
    pictured: int = 6
    certificate: bool = False

    def __post_init__(self) -> None:
        for kind, names, choices in (
            ("attack", self.attacks, ATTACKS),
            ("threat model", self.threats, THREATS),
        ):
            _names(kind, names, choices)
        for name in self.defenses:
            for part in name.split("+"):
                if part.strip() not in DEFENSES:
                    raise ConfigError(unknown("defense", part.strip(), DEFENSES))
        if not self.defenses:
            raise ConfigError("got no defense to audit; name one or more.")
        if self.stage not in STAGES:
            raise ConfigError(unknown("stage", self.stage, STAGES))
        if self.effort not in EFFORTS:
            raise ConfigError(unknown("effort", self.effort, EFFORTS))
        for name in ("images", "batch_size", "local_steps", "observations", "aggregated", "seeds"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        self._check_budget()
        self._check_clients()
        if self.local_steps > 1 and self.run.training.optimizer != "sgd":
            raise ConfigError(
                f"updates of {self.local_steps} steps are unrolled as SGD, but the run trains with "
                f"{self.run.training.optimizer}; audit local_steps 1, or a run with sgd."
            )
        if self.candidates < 2:
            raise ConfigError(f"candidates must be at least 2, got {self.candidates}.")

    def _check_clients(self) -> None:
        federation = self.run.federation
        clients = 1 if federation.method == "centralized" else federation.clients
        if self.aggregated > clients:
            raise ConfigError(
                f"aggregated is {self.aggregated}, but the federation has {clients} client(s); "
                "lower it, or train with more clients."
            )
        if self.certificate and self.aggregated > 1:
            raise ConfigError(
                f"a certificate is of one client's update, but aggregated is {self.aggregated}; "
                "leave the certificate out, or set aggregated to 1."
            )

    def _check_budget(self) -> None:
        for name in ("iterations", "parallel"):
            if (number := getattr(self, name)) is None:
                continue
            if number < 1:
                raise ConfigError(f"{name} must be at least 1, got {number}.")
            if not any(attack in SEARCHING for attack in self.attacks):
                raise ConfigError(
                    f"{name} is {number}, but none of the attacks searches: "
                    f"{', '.join(self.attacks)}; leave it out, or add one of: "
                    f"{', '.join(SEARCHING)}."
                )

    @property
    def judged(self) -> tuple[str, ...]:
        """Defenses the verdict is about: those asked for, controls aside if there are others."""
        return tuple(d for d in self.defenses if d not in CONTROLS) or self.defenses

    @property
    def grid(self) -> tuple[str, ...]:
        """Every defense that is attacked: the controls first."""
        return tuple(dict.fromkeys((*CONTROLS, *self.defenses)))

    @property
    def per_victim(self) -> int:
        """Images behind one observation of one victim."""
        return self.per_update * self.observations

    @property
    def per_update(self) -> int:
        """Images behind one update."""
        return self.batch_size * self.local_steps * self.aggregated

    @property
    def cost(self) -> str:
        """What there is to do, in words."""
        return (
            f"{number_of(len(self.grid), 'defense')} x {number_of(self.seeds, 'seed')} trained "
            f"where needed; then {number_of(len(self.attacks), 'attack')} under up to "
            f"{number_of(len(self.threats) + 1, 'threat model')} each on "
            f"{number_of(self.images, 'victim')} of {number_of(self.per_victim, 'image')}, effort "
            f"{self.effort}"
            + ("" if self.iterations is None else f", {number_of(self.iterations, 'iteration')}")
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def defended(self, defense: str, seed: int) -> RunConfig:
        """The federation with ``defense`` and the ``seed``-th seed."""
        base = self.run.defense
        settings = dataclasses.replace(base, name=defense)
        if "channel" not in defense:
            settings = dataclasses.replace(settings, preset=None)
        return dataclasses.replace(self.run, defense=settings, seed=self.run.seed + seed)


def _names(kind: str, names: tuple[str, ...], choices: Mapping[str, Any]) -> None:
    if not names:
        raise ConfigError(f"got no {kind}; name one or more of: {', '.join(choices)}.")
    for name in names:
        if name not in choices:
            raise ConfigError(unknown(kind, name, choices))
