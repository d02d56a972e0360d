"""Which attackers belong to which threat, and what they are given to work with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

from torch import Tensor, nn

from fedkl.attacks import (
    NEED_PUBLIC,
    Attack,
    Counted,
    GradientMatching,
    cached_generator,
    make_attack,
)
from fedkl.attacks.adaptive import (
    Fishing,
    FreeSecrets,
    Public,
    Start,
    adaptive_for,
    craft,
    train_secrets,
)
from fedkl.attacks.labels import classifier
from fedkl.attacks.network import Network
from fedkl.audit.config import ALIKE, KEY_HOLDER, AuditConfig
from fedkl.audit.floor import class_means, few_enough
from fedkl.audit.victims import Victims
from fedkl.data import DataBundle
from fedkl.errors import AttackError
from fedkl.observation import OPEN, Observation, ThreatModel, Training, threat_of
from fedkl.rng import derive

FEED_FORWARD: Final = (
    "closed-form", "peel", "shadow", "shadow-global", "shadow-label", "shadow-gradient",
    "retrieval", "retrieval-label", "retrieval-transport", "replay", "replay-matched",
    "replay-relations",
)  # fmt: skip
TARGET: Final = 0  # the class that a crafting server fishes for
COUNTED: Final = 1000  # public images by which the labels of batches are counted
EPOCHS: Final = 4  # passes over the public images to train secrets, as FreeSecrets has it
_NEED_A_KEY: Final = ("key-unknown", "key-regressed", "lock-gradient")


def applicable(names: Sequence[str], victims: Victims) -> tuple[ThreatModel, ...]:
    """The threat models that make a difference for these victims, the key holder first.

    Without secrets there is but one: the server knows everything. A keyless lock has no key to
    be guessed.
    """
    spec = victims.spec
    if spec is None or spec.scheme == "norm":
        crafting = [threat_of(n) for n in names if threat_of(n).crafting]
        return (OPEN, *crafting)
    found = [threat_of(KEY_HOLDER)]
    for name in dict.fromkeys(names):
        # Lock weights are one client's; behind an aggregate there are several.
        keyed = spec.scheme == "channel" and victims.audit.aggregated == 1
        if name == KEY_HOLDER or (name in _NEED_A_KEY and not keyed):
            continue
        if threat_of(name).ignores_block and not _ignores_something(victims):
            continue
        found.append(threat_of(name))
    return tuple(found)


def repeats(attack: str, threat: ThreatModel, threats: Sequence[ThreatModel]) -> bool:
    """Whether the attack does under ``threat`` what it does under another of ``threats``.

    Attacks without an optimizer do the same under all of :data:`fedkl.audit.config.ALIKE`: they are
    mounted once, under ``adaptive`` or, if that is not among ``threats``, the first one.
    """
    alike = [one.name for one in threats if one.name in ALIKE]
    if attack not in FEED_FORWARD or threat.name not in alike:
        return False
    return threat.name != ("adaptive" if "adaptive" in alike else alike[0])


class Arsenal:
    """Makes attacks for observations.

    Args:
        audit: Effort and seeds.
        bundle: Public images, which attackers may train on.
        folder: Where what they trained is kept.
        tell: Called with events.
    """

    def __init__(
        self,
        audit: AuditConfig,
        bundle: DataBundle,
        folder: Path,
        tell: Callable[[str, str, int, int, float], None],
    ) -> None:
        self.audit, self.bundle, self.folder, self.tell = audit, bundle, folder, tell

    def attack(
        self,
        name: str,
        threat: ThreatModel,
        observation: Observation,
        *,
        honest: Observation | None = None,
    ) -> Attack:
        """The attack called ``name`` as an attacker under ``threat`` mounts it.

        Args:
            name: Of the attack.
            threat: What the attacker knows.
            observation: A victim, for its lock spec, its secrets and its kind of update.
            honest: Where the weights were crafted, :func:`probe` of the honest ones.

        Raises:
            AttackError: It does not apply to this model or update.
        """
        single = make_attack(
            name,
            self.audit.effort,
            generator_model=self._generator() if name == "ggl" else None,
            public=self.public if name in NEED_PUBLIC else None,
            honest=honest,
            iterations=self.audit.iterations,
            parallel=self.audit.parallel,
        )
        counts = _counts(single, observation)
        start: tuple[Start, ...] | None = None
        secrets: dict[str, Tensor] = {}
        if frees(threat, single, observation) and (counts or honest is not None):
            secrets = self._secrets(observation if honest is None else honest)
            start = ("neutral", secrets)
        attack = adaptive_for(
            threat,
            single,
            observation,
            floor=self.floor if frees(threat, single, observation) and _adopts(single) else None,
            public=self.public,
            start=start,
        )
        if threat.crafting:
            return Fishing(attack, TARGET)
        return Counted(attack, self.public[0][:COUNTED], secrets) if counts else attack

    def _secrets(self, observation: Observation) -> dict[str, Tensor]:
        """Secrets with which the shared layers classify public images."""
        generator = derive(self.audit.run.seed, "secrets")
        return train_secrets(observation, Public(*self.public), generator=generator, epochs=EPOCHS)

    @cached_property
    def public(self) -> tuple[Tensor, Tensor]:
        """Public images and their labels: all of them, unless they are many and large."""
        return self.bundle.public.batch(few_enough(self.bundle.public))

    @cached_property
    def floor(self) -> Tensor:
        """Class means of the public images, (classes, C, H, W)."""
        return class_means(self.bundle.public, self.bundle.num_classes)[0]

    def _generator(self) -> nn.Module:
        images, labels = self.public
        steps = {"quick": 500, "standard": 3000, "paper": 6000}[self.audit.effort]

        def progress(done: int, of: int, loss: float) -> None:
            self.tell("train", "generator of images", done, of, loss)

        return cached_generator(
            self.folder / "generators",
            images,
            labels,
            self.bundle.num_classes,
            steps=steps,
            generator=derive(self.audit.run.seed, "generator"),
            progress=progress,
        )

    def crafted(self, victims: Victims, honest: Observation) -> dict[str, Tensor]:
        """The global state that a crafting server sends in place of the honest one.

        Raises:
            AttackError: The classifier is private, or has no bias.
        """
        weight, bias = classifier(Network(honest), self.bundle.num_classes)
        if bias is None:
            raise AttackError(f"the classifier {weight} has no bias; class fishing needs one.")
        return craft(victims.shared, TARGET, weight=weight, bias=bias)


def probe(victims: Victims) -> Observation:
    """What every victim's observation has: model, names of secrets, lock spec; no update."""
    model = victims.public_model()
    # Its own parameters stand in for an observed change: only their names are looked at.
    changes = {n: p.detach() for n, p in model.named_parameters()}
    return Observation(
        model=model,
        kind="gradient",
        changes=(changes,),
        image_shape=victims.bundle.image_shape,
        num_classes=victims.bundle.num_classes,
        training=Training(),
        threat=threat_of("crafting"),
        secrets=victims.secrets(model),
        spec=None if victims.spec is None else victims.spec.to_dict(),
    )


def _ignores_something(victims: Victims) -> bool:
    """Whether a shared tensor stands at or before the first lock; not where the stem is private."""
    seen = probe(victims)
    try:
        return bool(FreeSecrets(ignore="locked-block").ignored(seen, Network(seen)))
    except AttackError:
        return True  # nothing else is shared: the cell says so


def _adopts(attack: Attack) -> bool:
    return isinstance(attack, GradientMatching) and attack.adopts


def frees(threat: ThreatModel, attack: Attack, observation: Observation) -> bool:
    """Whether the attack searches the victim's private tensors without the lock's weights."""
    searches = isinstance(attack, GradientMatching) and bool(observation.secrets)
    return searches and threat.frees_secrets and not threat.lock_weights


def _counts(attack: Attack, observation: Observation) -> bool:
    """Whether the attack has labels of a batch to infer."""
    infers = isinstance(attack, GradientMatching) and attack.infers
    return infers and observation.labels is None and observation.training.images > 1
