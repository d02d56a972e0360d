"""Attackers that have the lock's weights: guess the key, search it, or read it off a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedkl.attacks.adaptive.laws import (
    MAPS,
    check_channel,
    draw_vector,
    key_affines,
    key_factor,
    weight_names,
)
from fedkl.attacks.adaptive.unknowns import AdaptiveSecrets, spec_of
from fedkl.attacks.network import Network
from fedkl.attacks.secrets import PREFIX
from fedkl.errors import AttackError, ConfigError
from fedkl.locking import LockSpec
from fedkl.observation import Observation

Tensors = Mapping[str, Tensor]

VECTOR = PREFIX + "key"
WEIGHTS = "lock:"


class _KeySecrets(AdaptiveSecrets):
    """γ and β follow from a key vector through the granted lock weights.

    Args:
        spec: The public lock spec, of scheme ``channel``.
        ignore: As in :class:`AdaptiveSecrets`.
    """

    def __init__(self, spec: LockSpec, *, ignore: str = "nothing", **settings: Any) -> None:
        super().__init__(ignore=ignore, **settings)
        check_channel(spec)
        self.spec = spec

    def given(self, observation: Observation, network: Network) -> dict[str, Tensor]:
        granted = observation.lock_weights
        if missing := [name for name in weight_names(self.spec) if name not in granted]:
            raise AttackError(
                f"{type(self).__name__} needs the lock's weights, and {missing[0]} was not "
                "granted; use a threat model that grants lock_weights, or 'adaptive'."
            )
        known = {n: observation.known.get(n, value) for n, value in network.secrets.items()}
        return {**known, **{WEIGHTS + n: granted[n].detach() for n in weight_names(self.spec)}}

    def start(
        self, observations: Sequence[Observation], rows: Sequence[int], generator: torch.Generator
    ) -> dict[str, Tensor]:
        return {VECTOR: torch.stack([draw_vector(self.spec, generator) for _ in rows])}

    def _affines(self, given: Tensors, vector: Tensor) -> dict[str, Tensor]:
        weights = {n.removeprefix(WEIGHTS): t for n, t in given.items() if n.startswith(WEIGHTS)}
        rest = {n: t for n, t in given.items() if not n.startswith(WEIGHTS)}
        made = key_affines(self.spec, weights, vector)
        return {**rest, **{n: t for n, t in made.items() if n in rest}}


class GuessedKey(_KeySecrets):
    """A random key of the spec's law, another for every trial: the attacker without the key."""

    label: ClassVar[str] = "guessed-key"
    words: ClassVar[str] = "γ and β come from the lock's weights and a random key"

    def values(self, unknowns: Tensors, given: Tensors, network: Network) -> dict[str, Tensor]:
        return self._affines(given, unknowns[VECTOR].detach())


class RegressedKey(_KeySecrets):
    """The key vector is searched along with the image, starting at a random key.

    Args:
        spec: The public lock spec.
        rate: Step of the key vector in units of the attack's own; None: 1/√length, with which γ
            and β move about as fast as the pixels.
        ignore: As in :class:`AdaptiveSecrets`.
    """

    label: ClassVar[str] = "regressed-key"
    words: ClassVar[str] = "the key vector is searched along with the image"

    def __init__(
        self, spec: LockSpec, *, rate: float | None = None, ignore: str = "nothing"
    ) -> None:
        super().__init__(spec, ignore=ignore, rate=rate)
        if rate is not None and rate <= 0:
            raise ConfigError(f"got rate {rate} of the key vector; expected a positive number.")
        self.rate = float(spec.settings["length"]) ** -0.5 if rate is None else rate

    def start(
        self, observations: Sequence[Observation], rows: Sequence[int], generator: torch.Generator
    ) -> dict[str, Tensor]:
        drawn = super().start(observations, rows, generator)
        return {name: value / self.rate for name, value in drawn.items()}

    def values(self, unknowns: Tensors, given: Tensors, network: Network) -> dict[str, Tensor]:
        return self._affines(given, unknowns[VECTOR] * self.rate)


class LockGradientKey(_KeySecrets):
    """The key vector in closed form from the gradient of the lock's weights; nothing is searched.

    Args:
        spec: The public lock spec.
        sign: Taken for the vector where neither a bias nor the law tells it; None tries both and
            lets the attack's loss choose.
        ignore: As in :class:`AdaptiveSecrets`.
    """

    label: ClassVar[str] = "lock-gradient"
    words: ClassVar[str] = "the key is read off the gradient of the lock's weights"

    def __init__(self, spec: LockSpec, *, sign: int | None = None, ignore: str = "nothing") -> None:
        super().__init__(spec, ignore=ignore, sign=sign)
        if sign not in (None, 1, -1):
            raise ConfigError(f"got sign {sign!r}; expected 1, -1 or None.")
        self.sign = sign

    def variants(
        self, observation: Observation, generator: torch.Generator
    ) -> tuple[AdaptiveSecrets, ...]:
        if self.sign is not None or sign_is_told(self.spec):
            return (self,)
        return tuple(LockGradientKey(self.spec, sign=s, ignore=self.ignore) for s in (1, -1))

    def start(
        self, observations: Sequence[Observation], rows: Sequence[int], generator: torch.Generator
    ) -> dict[str, Tensor]:
        return {}

    def given(self, observation: Observation, network: Network) -> dict[str, Tensor]:
        vector = read_key(observation)
        return self._affines(super().given(observation, network), vector * (self.sign or 1))

    def values(self, unknowns: Tensors, given: Tensors, network: Network) -> dict[str, Tensor]:
        return dict(given)


def sign_is_told(spec: LockSpec) -> bool:
    """Whether the lock's gradients tell the key vector's sign: by a bias, or by a law above 0."""
    return bool(spec.settings["bias"]) or spec.settings["law"] == "uniform"


def read_key(observation: Observation) -> Tensor:
    """The key vector from the gradients of a channel lock's weights.

    ∂L/∂W = δuᵀ has rank one: every row is a multiple of u, the key vector times a public factor.
    With a bias ∂L/∂b = δ, so u is exact. Without one, its direction is the first right singular
    vector, its length follows from the law (entries ±1; largest entry 1; variance 1), and its sign
    is open unless the law is uniform on [0, 1].

    Returns:
        float32 (length,): the vector, up to its sign unless :func:`sign_is_told`.

    Raises:
        AttackError: The gradients were not sent, or are zero (every channel of the lock is dead).
    """
    spec = spec_of(observation)
    check_channel(spec)
    weights, biases = _gradients(observation, spec)
    if not bool((weights != 0).any()):
        raise AttackError(
            "the gradient of the lock's weights is zero, so it does not show the key: an update "
            "without training, or a lock whose activation is dead on every channel."
        )
    factor = key_factor(spec, weights.shape[1])
    law = spec.settings["law"]
    if biases is not None:
        vector = (biases @ weights) / biases.square().sum() / factor
        return vector.sign().to(vector) if law == "sign" else vector
    # In float64 the direction is exact to the rounding of the gradient itself.
    direction: Tensor = torch.linalg.svd(weights.double(), full_matrices=False)[2][0].float()
    if law == "sign":
        return direction.sign()
    if law == "uniform":
        return direction * direction.sum().sign() / direction.abs().max()
    return direction / direction.square().mean().sqrt()


def _gradients(observation: Observation, spec: LockSpec) -> tuple[Tensor, Tensor | None]:
    """Gradients of all maps that hear the key: rows (R, length), and δ (R,) where told."""
    sites = spec.sites[:1] if spec.settings["chain"] else spec.sites
    names = [f"{site.name}.keylock.{kind}" for site in sites for kind, _ in MAPS]
    sent = observation.lock_gradients
    if not sent or any(f"{name}_weight" not in gradients for gradients in sent for name in names):
        raise AttackError(
            "the gradients of the lock's weights were not sent; this attacker belongs to the "
            "threat model 'lock-gradient'. Use 'adaptive' where they stay on the client."
        )
    weights = torch.cat([g[f"{name}_weight"] for g in sent for name in names])
    if not spec.settings["bias"]:
        return weights, None
    return weights, torch.cat([g[f"{name}_bias"] for g in sent for name in names])
