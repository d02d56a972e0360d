"""Secrets as unknowns: the attacker who knows the lock spec and frees every private tensor.

The key reaches the network through γ and β alone. Whoever makes these unknowns of the search
needs no key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from fedkl.attacks.adaptive.laws import draw_secrets
from fedkl.attacks.adaptive.shadow_client import Public, train_secrets
from fedkl.attacks.network import Network
from fedkl.attacks.secrets import PREFIX, Secrets
from fedkl.errors import AttackError, ConfigError, number_of, unknown
from fedkl.locking import LockSpec
from fedkl.observation import Observation

Tensors = Mapping[str, Tensor]
Start = str | Tensors

STARTS: Final = ("neutral", "law", "shadow")
IGNORES: Final = ("nothing", "locked-block")
AFFINES: Final = (".keylock.gamma", ".keylock.beta")


def is_affine(name: str) -> bool:
    """Whether a secret of a rebuilt model is the γ or β of a lock (else: stem, head, ...)."""
    return f".{name}".endswith(AFFINES)


def spec_of(observation: Observation) -> LockSpec:
    """The lock spec that the observation carries.

    Raises:
        AttackError: There is none.
    """
    if observation.spec is None:
        raise AttackError(
            "this attacker uses the lock spec, and the observation has none: either the victim has "
            "no lock (attack it without secrets) or Observation.spec was left out."
        )
    return LockSpec.from_dict(observation.spec)


class AdaptiveSecrets(Secrets):
    """What all adaptive attackers share.

    Args:
        ignore: ``nothing``, or ``locked-block``: gradients of the tensors at and before the first
            lock (in the model's order) are left out of the comparison.
        settings: What the subclass adds, for ``repr``.
    """

    label: ClassVar[str]
    """How results refer to it, behind the attack's name."""
    words: ClassVar[str]
    """One sentence for people."""

    def __init__(self, *, ignore: str = "nothing", **settings: Any) -> None:
        if ignore not in IGNORES:
            raise ConfigError(unknown("gradients to ignore", ignore, IGNORES))
        self.ignore = ignore
        self.settings = {**settings, "ignore": ignore}

    def variants(
        self, observation: Observation, generator: torch.Generator
    ) -> tuple[AdaptiveSecrets, ...]:
        """Alternatives, each of which is tried; the attack's loss chooses."""
        return (self,)

    def ignored(self, observation: Observation, network: Network) -> frozenset[str]:
        if self.ignore == "nothing":
            return frozenset()
        site = spec_of(observation).sites[0]
        block = site.name
        if site.inserted:  # the norm is a child of the layer it normalizes
            block = block.rpartition(".")[0]
        inside = [i for i, n in enumerate(network.names) if f".{n}".startswith(f".{block}.")]
        before = _position(network, block) if not inside else max(inside) + 1
        left_out = frozenset(network.names[:before])
        if len(left_out) == len(network.names):
            raise AttackError(
                f"every shared tensor is at or before the first lock ({site.name}); without their "
                "gradients there is nothing to match. Use ignore='nothing'."
            )
        return left_out

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{type(self).__name__}({settings})"


class FreeSecrets(AdaptiveSecrets):
    """Every private tensor is an unknown: γ, β, and weights of a private stem or head.

    Args:
        start: ``neutral`` (γ = 1, β = 0, fresh weights); ``law``: drawn from the lock spec's law,
            anew for every trial; ``shadow``: tried from ``neutral``, and from the secrets of a
            client of the attacker's own (:func:`train_secrets`); or such secrets by name; or
            several of these, each of which is tried. Where a
            lock draws signs at random and training has taken them up, a shadow is what works: a
            search of images and γ together hardly carries a γ through zero.
        rate: Step of γ and β in units of the attack's own: an unknown u stands for rate·u, so that
            it works alike with every optimizer.
        weight_rate: The same for private weights, which are smaller.
        public: Labeled public images, which ``shadow`` needs.
        epochs: Passes over them to train the secrets of ``shadow``.
        ignore: As in :class:`AdaptiveSecrets`.
    """

    label: ClassVar[str] = "secrets"
    words: ClassVar[str] = "every private tensor is searched along with the image"

    def __init__(
        self,
        *,
        start: Start | Sequence[Start] = "neutral",
        rate: float = 0.5,
        weight_rate: float = 0.05,
        public: Public | None = None,
        epochs: int = 4,
        ignore: str = "nothing",
    ) -> None:
        several = start if isinstance(start, Sequence) and not isinstance(start, str) else (start,)
        shown = [
            s if isinstance(s, str) else f"given ({number_of(len(s), 'tensor')})" for s in several
        ]
        super().__init__(
            ignore=ignore,
            start=shown[0] if len(shown) == 1 else tuple(shown),
            rate=rate,
            weight_rate=weight_rate,
            public=public,
            epochs=epochs,
        )
        for one in several:
            if isinstance(one, str) and one not in STARTS:
                raise ConfigError(unknown("start of the secrets", one, STARTS))
        if min(rate, weight_rate) <= 0:
            raise ConfigError(
                f"got rate {rate}, weight_rate {weight_rate}; both must be positive numbers."
            )
        if "shadow" in shown and public is None:
            raise ConfigError("start 'shadow' trains on public images; pass public=Public(x, y).")
        self.starts, self.begin = tuple(several), several[0]
        self.rate, self.weight_rate = rate, weight_rate
        self.public, self.epochs = public, epochs

    def variants(
        self, observation: Observation, generator: torch.Generator
    ) -> tuple[AdaptiveSecrets, ...]:
        if self.starts in (("neutral",), ("law",)):
            return (self,)
        starts: list[Start] = []
        for start in self.starts:
            if start != "shadow":
                starts.append(start)
                continue
            assert self.public is not None
            trained = train_secrets(
                observation, self.public, generator=generator, epochs=self.epochs
            )
            starts += ["neutral", trained]
        return tuple(
            type(self)(
                start=start, rate=self.rate, weight_rate=self.weight_rate, ignore=self.ignore
            )
            for start in starts
        )

    def frees(self, name: str) -> bool:
        """Whether the secret called ``name`` is an unknown."""
        return True

    def given(self, observation: Observation, network: Network) -> dict[str, Tensor]:
        known = {n: observation.known.get(n, value) for n, value in network.secrets.items()}
        if not any(self.frees(name) for name in known):
            raise AttackError(
                f"{type(self).__name__} finds nothing to free: the model's secrets are "
                f"{sorted(known)[:4] or 'none'}. Attack it without adaptive secrets."
            )
        return known

    def start(
        self, observations: Sequence[Observation], rows: Sequence[int], generator: torch.Generator
    ) -> dict[str, Tensor]:
        first = observations[0]
        neutral = {n: p.detach() for n, p in first.model.named_parameters() if n in first.secrets}
        drawn = [self._of_clients(first, neutral, generator) for _ in rows]
        return {
            PREFIX + name: torch.stack([d[name] for d in drawn]) / self._rate(name)
            for name in neutral
            if self.frees(name)
        }

    def _of_clients(
        self, observation: Observation, neutral: Tensors, generator: torch.Generator
    ) -> Tensors:
        """Behind an aggregate every client has secrets of its own: one more axis in front."""
        clients = observation.training.clients
        parts = [self._begin(observation, neutral, generator) for _ in range(clients)]
        if clients == 1:
            return parts[0]
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}

    def _begin(
        self, observation: Observation, neutral: Tensors, generator: torch.Generator
    ) -> Tensors:
        if not isinstance(self.begin, str):
            return {name: self.begin.get(name, value) for name, value in neutral.items()}
        if self.begin != "law":
            return neutral
        return draw_secrets(spec_of(observation), neutral, generator)

    def values(self, unknowns: Tensors, given: Tensors, network: Network) -> dict[str, Tensor]:
        return {
            name: unknowns[PREFIX + name] * self._rate(name) if self.frees(name) else value
            for name, value in given.items()
        }

    def _rate(self, name: str) -> float:
        return self.rate if is_affine(name) else self.weight_rate


class FreeAffines(FreeSecrets):
    """γ and β of every lock are unknowns; other private tensors stay as granted or neutral."""

    label: ClassVar[str] = "affine"
    words: ClassVar[str] = "γ and β of every lock are searched along with the image"

    def frees(self, name: str) -> bool:
        return is_affine(name)


def _position(network: Network, block: str) -> int:
    """How many shared parameters come before the module ``block``, which has none itself."""
    order = [name for name, _ in network.model.named_parameters()]
    first = next((i for i, n in enumerate(order) if f".{n}".startswith(f".{block}.")), 0)
    return sum(name in network.shared for name in order[:first])
