"""What an attacker sees, and what it knows beyond that: frozen facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedkl.errors import ConfigError, number_of, unknown

KINDS: Final = ("gradient", "update")


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """What an attacker knows beyond the update, how it was made, the architecture, the lock spec.

    Attributes:
        name: How results refer to it.
        words: One sentence for people.
        labels: The true labels are given.
        lock_weights: The lock's matrices and biases are given, the key is not.
        key: Key and lock are given: every private tensor is known. The positive control.
        lock_gradients: The gradient of the lock's own parameters is in the update.
        crafting: The server may send weights of its own making.
        frees_secrets: The attacker treats private tensors as unknowns to be found (Kerckhoffs).
        ignores_block: It leaves out the gradients of the tensors at and before the first lock.
    """

    name: str
    words: str
    labels: bool = False
    lock_weights: bool = False
    key: bool = False
    lock_gradients: bool = False
    crafting: bool = False
    frees_secrets: bool = False
    ignores_block: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


THREATS: Final[Mapping[str, ThreatModel]] = {
    threat.name: threat
    for threat in (
        ThreatModel(
            name="key-unknown",
            words="The server has the lock's weights but not the key, and guesses one.",
            lock_weights=True,
        ),
        ThreatModel(
            name="key-regressed",
            words="The server has the lock's weights and searches the key along with the image.",
            lock_weights=True,
            frees_secrets=True,
        ),
        ThreatModel(
            name="key-shared",
            words="The server holds key and lock: the positive control.",
            lock_weights=True,
            key=True,
        ),
        ThreatModel(
            name="lock-gradient",
            words="The client also sends the gradient of its lock's weights.",
            lock_weights=True,
            lock_gradients=True,
        ),
        ThreatModel(
            name="adaptive",
            words=(
                "The server knows the lock's public spec and treats every private tensor as an "
                "unknown."
            ),
            frees_secrets=True,
        ),
        ThreatModel(
            name="block-ignored",
            words=(
                "As adaptive, but the server leaves out the gradients up to the first lock, which "
                "its secrets distort most."
            ),
            frees_secrets=True,
            ignores_block=True,
        ),
        ThreatModel(
            name="crafting",
            words="The server also sends weights of its own making, to make one image stand out.",
            frees_secrets=True,
            crafting=True,
        ),
    )
}


OPEN: Final = ThreatModel(
    name="open", words="Nothing is private: the server knows every tensor of the model."
)
"""For models without secrets."""


def threat_of(name: str) -> ThreatModel:
    """The preset called ``name``.

    Raises:
        ConfigError: There is none, with the nearest names.
    """
    if name not in THREATS:
        raise ConfigError(unknown("threat model", name, THREATS))
    return THREATS[name]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a client made an update, as far as the attacker knows.

    Attributes:
        batch_size: Examples per step, at least 1.
        local_steps: Optimizer steps, at least 1.
        repeats: Whether every step saw the same batch (local epochs over one batch); otherwise
            every step had a batch of its own.
        lr, momentum, nesterov, weight_decay: Of the client's SGD.
        train_mode: Batch norms used the batch's own statistics.
        clients: Clients behind one update, which is their plain mean: what a server sees through
            secure aggregation. Each has batches (and secrets) of its own.
        length: L2 norm over the shared parameters at which every client sends its update, however
            large it was; None: as it is.
        prune_ratio: Share of every tensor's entries that every client removes from its update, the
            smallest ones (:func:`fedkl.pruning.kept`), after the length; None: none.
        clip: L2 norm to which every client shortens its update where it is longer; None: to none.
        clip_first: Whether that is before entries are removed.
        noise: Standard deviation of the Gaussian noise on every entry of every client's update.
    """

    batch_size: int = 1
    local_steps: int = 1
    repeats: bool = False
    lr: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    train_mode: bool = True
    clients: int = 1
    length: float | None = None
    prune_ratio: float | None = None
    clip: float | None = None
    clip_first: bool = False
    noise: float = 0.0

    @property
    def images(self) -> int:
        """Distinct images behind one update."""
        return self.batch_size * self.batches * self.clients

    @property
    def batches(self) -> int:
        """Batches of one client: one for every step, unless all of them saw the same."""
        return 1 if self.repeats else self.local_steps

    @property
    def presentations(self) -> int:
        """Images times the training steps they passed through."""
        return self.batch_size * self.local_steps * self.clients

    @property
    def steps_taken(self) -> float:
        """How many plain SGD steps along one gradient make the update: momentum takes longer ones.

        One step is 1, or 1 + momentum with Nesterov's.
        """
        velocity = total = 0.0
        for _ in range(self.local_steps):
            velocity = self.momentum * velocity + 1
            total += 1 + self.momentum * velocity if self.nesterov else velocity
        return total

    @property
    def altered(self) -> str:
        """What was done to an update that exact equations do not survive, in words, or ""."""
        removed, clip = self.prune_ratio, self.clip
        words = {
            f"pruned by {removed}": bool(removed),
            f"clipped to {clip}": clip is not None,
            f"noised by {self.noise:g}": self.noise > 0,
        }
        return " and ".join(text for text, is_so in words.items() if is_so)

    def gradient(self, change: Tensor, parameter: Tensor) -> Tensor:
        """The gradient of the loss behind an update: exact for one step, else a mean over steps.

        Of an update that was sent at one length or clipped its direction alone, weight decay
        included; of one that was pruned 0 where nothing was sent.

        Args:
            change: A parameter before the steps minus after, of any shape.
            parameter: The parameter before, for its weight decay; broadcasts.
        """
        if self.length is not None or self.clip is not None:
            return change
        found = change / (self.lr * self.steps_taken) - self.weight_decay * parameter
        return torch.where(change == 0, 0.0, found) if self.prune_ratio else found


@dataclass(frozen=True, eq=False)
class Observation:
    """Everything an attacker gets to see of one victim: one update, or several under one lock.

    Attributes:
        model: The public architecture with the shared tensors as the victim had them. What is
            private stands in it as ordinary parameters with neutral values, listed in ``secrets``.
            Never trained in place.
        kind: ``gradient`` (of the mean loss) or ``update`` (weights before minus after).
        changes: T observed changes by parameter name: those of the shared parameters.
        image_shape: (C, H, W) of one image.
        num_classes: Length of the model's output.
        training: How the updates were made.
        threat: What else the attacker knows.
        secrets: Names of the model's parameters that are private.
        known: True values of secrets that the threat model grants; of an update of several clients
            with one more axis in front, over the clients.
        labels: True labels (T, images), if the threat model grants them; those of several clients
            in an order that does not tell whose they are.
        ordered: Whether labels granted of one client stand in the order of its steps; if not,
            attacks deal them out to the steps as they do labels that they have counted.
        spec: The lock spec as plain data, None without a lock.
        lock_weights: The lock's own tensors by state-dict name, if granted.
        lock_gradients: T gradients of the lock's own parameters, if sent.
        statistics: T maps of the batch-norm statistics that were sent, by buffer name, as they were
            after the client's steps; those before stand in ``model``. Searches match them along
            with the gradient.
    """

    model: nn.Module = field(repr=False)
    kind: str
    changes: tuple[Mapping[str, Tensor], ...] = field(repr=False)
    image_shape: tuple[int, int, int]
    num_classes: int
    training: Training
    threat: ThreatModel
    secrets: tuple[str, ...] = ()
    known: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    labels: Tensor | None = None
    ordered: bool = True
    spec: Mapping[str, Any] | None = field(default=None, repr=False)
    lock_weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    lock_gradients: tuple[Mapping[str, Tensor], ...] = field(default=(), repr=False)
    statistics: tuple[Mapping[str, Tensor], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(unknown("kind of observation", self.kind, KINDS))
        if not self.changes:
            raise ConfigError("got an observation without any update; expected one or more.")
        for name in ("lock_gradients", "statistics"):
            given = len(getattr(self, name))
            if given not in (0, len(self.changes)):
                raise ConfigError(
                    f"got {given} {name} for {number_of(len(self.changes), 'update')}; expected "
                    "one for each, or none."
                )

    @property
    def count(self) -> int:
        """Number of updates, T."""
        return len(self.changes)
