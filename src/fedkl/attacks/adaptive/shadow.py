"""The shadow attack: learn on a client of one's own what a victim's gradient looks like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from fedkl.attacks.adaptive.shadow_client import (
    Public,
    ShadowClient,
    check_single,
    train_secrets,
)
from fedkl.attacks.adaptive.shadow_decoder import (
    MIN_PER_CLASS,
    RESTANDARDIZATIONS,
    Coordinates,
    Decoder,
)
from fedkl.attacks.adaptive.sketch import Sketch, gradients_of
from fedkl.attacks.adaptive.transport import Transport, directions
from fedkl.attacks.base import Attack, Progress, Reconstruction, each
from fedkl.attacks.closed_form import penultimate_features
from fedkl.attacks.distances import check_size
from fedkl.attacks.labels import classifier, infer_labels
from fedkl.attacks.network import Network
from fedkl.errors import AttackError, ConfigError, number_of, unknown
from fedkl.observation import Observation

VARIANTS: Final = ("features", "gradient")
WAYS: Final = (*RESTANDARDIZATIONS, "transport")
ENOUGH: Final = 20  # updates under one lock, to take a mean and a deviation from
CLOSENESS: Final = 1000  # public images by which a shadow is compared with the victims


@dataclass(frozen=True)
class Side:
    """One shadow, and the public images as it sees them.

    Attributes:
        client: The client.
        sketch: What its gradients are sketched with; None: it gives away features.
        coordinates: Its own.
        inputs: What it gives away of every public image (M, d), as it is.
    """

    client: ShadowClient
    sketch: Sketch | None
    coordinates: Coordinates
    inputs: Tensor


class Shadow(Attack):
    """A decoder from the victim's features or gradient to the image, learned on public images.

    The attacker trains secrets of its own against the victim's shared layers, makes updates of
    public images with them, and learns to undo that. All victims of one call share one lock. With
    secrets granted (the control that holds the key) it uses those; without a lock there are none.
    Either way every shadow is the victim itself, and what it gives away is made once.

    Args:
        images: Public images (M, C, H, W) in [0, 1].
        labels: Their labels (M,), integers within the model's classes.
        variant: ``features``: from the classifier's input, which its gradient gives away exactly;
            ``gradient``: from the whole shared gradient, as ever where the classifier is private.
        restandardize: None, ``global`` or ``label``: bring victims into the shadow's coordinates
            by statistics of the victims of the call (:meth:`Coordinates.align`); ``transport``: by
            a rotation fitted to them (:class:`~fedkl.attacks.adaptive.transport.Transport`).
        shadows: Clients of the attacker's own, each with secrets and a decoder; images are
            averaged.
        candidates: Sets of secrets trained for each shadow; the one whose class means come
            closest to the victims' is kept. Locks have mirror images that classify as well as the
            victim's but show other features: with one candidate it is luck which one is found.
        secret_epochs: Passes over the public images to train secrets.
        hidden: Width of the decoder's network; 0: ridge regression alone.
        epochs: Passes over the public images to train the decoder.
        sketch: Length that a gradient is sketched to.
        honest: An observation of the same model with honest weights, where the victims' were
            crafted: secrets are trained there, for with crafted weights nothing can be learned.
    """

    name: ClassVar[str] = "shadow"
    ways: ClassVar[tuple[str | None, ...]] = WAYS
    chancy: ClassVar[bool] = True
    """Whether what is learned twice on one client differs."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        variant: str = "features",
        restandardize: str | None = None,
        shadows: int = 1,
        candidates: int = 1,
        secret_epochs: int = 3,
        hidden: int = 512,
        epochs: int = 10,
        sketch: int = 2048,
        honest: Observation | None = None,
    ) -> None:
        self.public = Public(images, labels)
        super().__init__(
            public=self.public,
            variant=variant,
            restandardize=restandardize,
            shadows=shadows,
            candidates=candidates,
            secret_epochs=secret_epochs,
            hidden=hidden,
            epochs=epochs,
            sketch=sketch,
            **({} if honest is None else {"secrets": "trained at honest weights"}),
        )
        self.honest = honest
        self.variant, self.restandardize, self.shadows = variant, restandardize, shadows
        self.secret_epochs, self.hidden, self.epochs = secret_epochs, hidden, epochs
        self.candidates, self.sketch = candidates, sketch
        self._check_settings()

    def _check_settings(self) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(unknown("variant of the shadow", self.variant, VARIANTS))
        how = self.restandardize
        if how not in self.ways:
            raise ConfigError(unknown("restandardization", str(how), [*map(str, self.ways[1:])]))
        ones = (self.shadows, self.candidates, self.epochs, self.sketch)
        if min(ones) < 1 or min(self.secret_epochs, self.hidden) < 0:
            raise ConfigError(
                f"got shadows {self.shadows}, candidates {self.candidates}, epochs {self.epochs}, "
                f"sketch {self.sketch}, secret_epochs {self.secret_epochs}, hidden {self.hidden}; "
                "expected the first four from 1, the others from 0."
            )

    def reconstruct(
        self,
        observations: Sequence[Observation],
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> list[Reconstruction]:
        """As :meth:`Attack.reconstruct`; the loss is nan.

        Fewer than 20 updates are not restandardized, and a note says so: their mean and deviation
        would tell of the images more than of the lock.

        Raises:
            AttackError: Updates of more than one image or step, or of zeros, labels that nothing
                tells, or public images of another shape or of classes that the model does not have.
        """
        first, network = self._check(observations)
        found = each(observations, lambda o: infer_labels(o, network).reshape(-1))
        labels = torch.cat(found)
        seen, sketch = self._given_away(observations, network, generator)
        moved: list[Tensor] = []
        learned, side, same = [], None, holds_all(first, network)
        count = 1 if same and not self.chancy else self.shadows
        for number in range(count):
            if new := side is None or not same:
                client = self._client(first, network, generator, (seen, labels), sketch)
                side = self._side(client, sketch)
            assert side is not None
            tell = self._teller(number, count, progress)
            learned.append(self._learn(side, generator, tell))
            moved.append(self._moved(side, seen, labels, self._how(labels)) if new else moved[0])
        notes = self._notes(first, labels, "features" if sketch is None else "gradient")
        return self._answers(learned, moved, found, notes)

    def _given_away(
        self, observations: Sequence[Observation], network: Network, generator: torch.Generator
    ) -> tuple[Tensor, Sketch | None]:
        """What the updates tell (N, d): features, or sketched gradients and what sketched them."""
        if self.variant == "features" and gives_features(observations[0], network):
            return torch.cat(each(observations, lambda o: penultimate_features(o, network))), None
        sketch = Sketch(network.shared, self.sketch, generator)
        return torch.cat([sketch(gradients_of(o, network)) for o in observations]), sketch

    def _side(self, client: ShadowClient, sketch: Sketch | None) -> Side:
        """The client and what it gives away of the public images."""
        inputs = given_away(client, self.public.images, self.public.labels, sketch)
        coordinates = Coordinates.of(inputs, self.public.labels, client.num_classes)
        return Side(client, sketch, coordinates, inputs)

    def _moved(self, side: Side, seen: Tensor, labels: Tensor, how: str | None) -> Tensor:
        """What victims gave away (N, d), in the shadow's coordinates."""
        coordinates = side.coordinates
        if how != "transport":
            return coordinates.align(seen, labels, how)
        classes = len(coordinates.class_means)
        transport = Transport(coordinates.enter(side.inputs), self.public.labels, classes)
        return transport.move(coordinates.align(seen, labels, "global"), labels)

    def _answers(
        self,
        learned: Sequence[Any],
        moved: Sequence[Tensor],
        labels: Sequence[Tensor],
        notes: tuple[str, ...],
    ) -> list[Reconstruction]:
        """One per victim: the mean of what the shadows' decoders draw."""
        every, shape = torch.cat([*labels]), tuple(self.public.images.shape[1:])
        pairs = zip(learned, moved, strict=True)
        drawn = torch.stack([decoder.decode(x, every, shape) for decoder, x in pairs]).mean(dim=0)
        images = torch.split(drawn, [len(mine) for mine in labels])
        return [
            Reconstruction(images=x[:, None], labels=y[:, None], notes=notes)
            for x, y in zip(images, labels, strict=True)
        ]

    def _check(self, observations: Sequence[Observation]) -> tuple[Observation, Network]:
        if not observations:
            raise AttackError("got no observation; expected one or more.")
        first = observations[0]
        for observation in observations:
            check_single(observation)
        self.public.check(first)
        network = Network.of(observations)
        each(observations, lambda o: check_size(o, network.names, squared=False))
        return first, network

    def _client(
        self,
        observation: Observation,
        network: Network,
        generator: torch.Generator,
        victims: tuple[Tensor, Tensor | None],
        sketch: Sketch | None,
    ) -> ShadowClient:
        """The victim itself if its secrets are granted, else the closest of several trained.

        ``victims``: what they gave away and their labels, None where updates have several.
        """
        classes = observation.num_classes
        if holds_all(observation, network):
            held = {name: observation.known[name] for name in network.secrets}
            return ShadowClient(network, held, classes)
        images, labels = self.public.images[:CLOSENESS], self.public.labels[:CLOSENESS]
        best, least = None, float("inf")
        for _ in range(self.candidates):
            secrets = train_secrets(
                observation if self.honest is None else self.honest,
                self.public,
                generator=generator,
                epochs=self.secret_epochs,
                network=network if self.honest is None else None,
            )
            client = ShadowClient(network, secrets, classes)
            if self.candidates == 1:
                return client
            mine = given_away(client, images, labels, sketch)
            seen, found = victims
            if found is None:
                found, whole = torch.zeros(len(seen), dtype=torch.int64), torch.zeros_like(labels)
                far = distance_of_means(mine, whole, seen, found, 1)
            else:
                far = distance_of_means(mine, labels, seen, found, classes)
            if best is None or far < least:
                best, least = client, far
        assert best is not None
        return best

    def _learn(self, side: Side, generator: torch.Generator, tell: Callable[[float], None]) -> Any:
        """What is learned on one shadow, told the loss of every epoch: here, a decoder."""
        classes = len(side.coordinates.class_means)
        decoder = Decoder(side.coordinates, classes, hidden=self.hidden, epochs=self.epochs)
        decoder.fit(side.inputs, self.public.labels, self.public.images, generator, tell)
        return decoder

    def _teller(
        self, number: int, count: int, progress: Progress | None
    ) -> Callable[[float], None]:
        """To be told the loss of every epoch of the shadow of that number, of ``count``."""
        done = number * self.epochs

        def tell(loss: float) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, count * self.epochs, loss)

        return tell

    def _how(self, labels: Tensor) -> str | None:
        """The restandardization that these victims allow.

        Controls that hold the key go through it as well, needless as it is for them: they are to
        show what the same attack can do.
        """
        if len(labels) < ENOUGH:
            return None
        if self.restandardize == "transport" and not directions(labels):
            return "global"
        return self.restandardize

    def _notes(self, observation: Observation, labels: Tensor, variant: str) -> tuple[str, ...]:
        own = "no secrets" if not observation.secrets else f"{self.shadows} shadow client(s)"
        if observation.secrets and set(observation.secrets) <= observation.known.keys():
            own = "the victim's secrets"
        how = self._how(labels)
        note = f"{self.name} on {variant} with {own}; restandardized: {how or 'no'}"
        if len(labels) < ENOUGH and self.restandardize is not None:
            got = number_of(len(labels), "update")
            few = f"{got}, too few to restandardize by (from {ENOUGH} on)"
            return note, few
        if how != self.restandardize:
            return (
                note,
                "too few victims for their classes, or one class: restandardized as by 'global'",
            )
        if how == "label" and int(torch.bincount(labels).max()) < MIN_PER_CLASS:
            few = f"no class has {MIN_PER_CLASS} victims or more: restandardized as by 'global'"
            return note, few
        return (note,)


def holds_all(observation: Observation, network: Network) -> bool:
    """Whether the attacker has every secret of the victim's; without a lock there are none."""
    return network.secrets.keys() <= observation.known.keys()


def gives_features(observation: Observation, network: Network) -> bool:
    """Whether the classifier is shared, so that its gradient gives its input away.

    Of a pruned one little is left of it.
    """
    if observation.training.prune_ratio:
        return False
    try:
        classifier(network, observation.num_classes)
    except AttackError:
        return False
    return True


def given_away(
    client: ShadowClient, images: Tensor, labels: Tensor, sketch: Sketch | None
) -> Tensor:
    """What the client gives away of each image (N, d): features, or sketched gradients."""
    if sketch is None:
        return client.features(images)
    return torch.cat([sketch(chunk) for chunk in client.gradients(images, labels)])


def distance_of_means(
    mine: Tensor, labels: Tensor, seen: Tensor, seen_labels: Tensor, num_classes: int
) -> float:
    """Mean squared difference of the class means of two clients, in deviations of the first.

    Args:
        mine: What a shadow client gives away (N, d), with ``labels`` (N,).
        seen: What the victims gave away (M, d), with leaked ``seen_labels`` (M,).
        num_classes: Classes that only one of the two has are passed over.

    Returns:
        The distance; inf if no class is in both.
    """
    deviation = mine.std(dim=0) + 1e-3 * mine.std(dim=0).mean() + 1e-12
    far = [
        ((mine[labels == k].mean(dim=0) - seen[seen_labels == k].mean(dim=0)) / deviation)
        .square()
        .mean()
        for k in range(num_classes)
        if bool((labels == k).any()) and bool((seen_labels == k).any())
    ]
    return float(torch.stack(far).mean()) if far else float("inf")
