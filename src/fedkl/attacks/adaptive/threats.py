"""Which attackers belong to a threat model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from torch import Tensor

from fedkl.attacks.adaptive.keys import GuessedKey, LockGradientKey, RegressedKey
from fedkl.attacks.adaptive.shadow_client import Public
from fedkl.attacks.adaptive.unknowns import (
    AdaptiveSecrets,
    FreeAffines,
    FreeSecrets,
    Start,
    is_affine,
    spec_of,
)
from fedkl.attacks.adaptive.wrapper import Adaptive
from fedkl.attacks.base import Attack
from fedkl.attacks.matching import GradientMatching
from fedkl.observation import Observation, ThreatModel

Starts = Start | Sequence[Start]
Make = Callable[[Observation, Starts, Public | None], AdaptiveSecrets]


def _free(observation: Observation, start: Starts, public: Public | None) -> FreeSecrets:
    """γ and β where nothing else is private, else everything."""
    affine = all(is_affine(name) for name in observation.secrets)
    return (FreeAffines if affine else FreeSecrets)(start=start, public=public)


def _ignoring(observation: Observation, start: Starts, public: Public | None) -> AdaptiveSecrets:
    """As :func:`_free`, without the gradients at and before the first lock."""
    kind = type(_free(observation, "neutral", None))
    return kind(start=start, public=public, ignore="locked-block")


def _guessed(observation: Observation, start: Starts, public: Public | None) -> AdaptiveSecrets:
    return GuessedKey(spec_of(observation))


def _regressed(observation: Observation, start: Starts, public: Public | None) -> AdaptiveSecrets:
    return RegressedKey(spec_of(observation))


def _read(observation: Observation, start: Starts, public: Public | None) -> AdaptiveSecrets:
    return LockGradientKey(spec_of(observation))


# Threat models that grant lock weights mean nothing for a lock that has none (fedbn, pad): there
# the attacker is left with what it can do without them.
ATTACKERS: Final[Mapping[str, tuple[Make | None, Make | None]]] = {
    "key-unknown": (_guessed, None),
    "key-regressed": (_regressed, _free),
    "key-shared": (None, None),
    "lock-gradient": (_read, None),
    "adaptive": (_free, _free),
    "block-ignored": (_ignoring, _ignoring),
    "crafting": (_free, _free),
}
"""By threat model: secrets for a lock with a key vector, and for any other; None: as granted."""


def adaptive_for(
    threat: ThreatModel,
    attack: Attack,
    observation: Observation,
    *,
    floor: Tensor | None = None,
    public: tuple[Tensor, Tensor] | None = None,
    start: Starts | None = None,
) -> Attack:
    """``attack`` as someone would carry it out who knows what ``threat`` grants.

    Args:
        threat: The threat model; one without a row in :data:`ATTACKERS` goes by its facts.
        attack: Any attack. One that is not of the gradient-matching family (``closed-form``,
            ``shadow``) comes back as it is: it treats secrets in its own way.
        observation: A victim, for its lock spec and the names of its secrets.
        floor: As in :class:`Adaptive`.
        public: Public images (M, C, H, W) and labels (M,). Free secrets are then searched from the
            neutral start and from secrets trained on them, at twice the cost.
        start: Free secrets are searched from these values, or from each of several, instead. At
            crafted weights no secrets can be trained: train them (:func:`train_secrets`) on an
            observation with the honest ones and pass ``("neutral", trained)``.

    Returns:
        An :class:`Adaptive`, or ``attack`` itself if there is no secret to be found.
    """
    if not isinstance(attack, GradientMatching):
        return attack
    make = _maker(threat, observation) if observation.secrets else None
    if make is None:
        return attack
    images = None if public is None or start is not None or threat.crafting else Public(*public)
    begin: Starts = start if start is not None else "neutral" if images is None else "shadow"
    return Adaptive(attack, make(observation, begin, images), floor=floor)


def _maker(threat: ThreatModel, observation: Observation) -> Make | None:
    name = threat.name if threat.name in ATTACKERS else _kind(threat)
    spec = observation.spec
    keyed = spec is not None and spec.get("scheme") == "channel"
    return ATTACKERS[name][0 if keyed else 1]


def _kind(threat: ThreatModel) -> str:
    """The preset whose grants a threat model of the caller's has."""
    if threat.key:
        return "key-shared"
    if threat.lock_gradients and threat.lock_weights:
        return "lock-gradient"
    if threat.lock_weights:
        return "key-regressed" if threat.frees_secrets else "key-unknown"
    if threat.ignores_block:
        return "block-ignored"
    return "adaptive" if threat.frees_secrets else "key-shared"
