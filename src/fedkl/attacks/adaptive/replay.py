"""The replay attack: repeat the victim's step on given images, and compare the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedkl.attacks.adaptive.matched import Matched, Pool, rotated
from fedkl.attacks.adaptive.mixture import best, parts
from fedkl.attacks.adaptive.noisy import weighed
from fedkl.attacks.adaptive.retrieval import Gallery, Retrieval
from fedkl.attacks.adaptive.shadow import Side, given_away, holds_all
from fedkl.attacks.adaptive.shadow_client import ShadowClient
from fedkl.attacks.adaptive.shadow_decoder import RESTANDARDIZATIONS
from fedkl.attacks.adaptive.sketch import LinearSketch, gradients_of
from fedkl.attacks.adaptive.within import Within
from fedkl.attacks.base import Progress, Reconstruction, Together, each
from fedkl.attacks.distances import check_size
from fedkl.attacks.network import Network
from fedkl.errors import AttackError, number_of
from fedkl.observation import Observation

RIDGE: Final = 1.0
"""Of the directions in which gradients are compared (:class:`Within`)."""
BATCH_RIDGE: Final = 0.03
"""The same for updates of several images. There all directions are needed to tell these apart."""
BATCH_SKETCH: Final = 2
"""For the same reason their sketches are so many times as long."""


class Replay(Retrieval):
    """A client of the attacker's own makes the gradient of every image in question.

    Nothing is learned but the secrets. Without a lock, or holding the key, these gradients are the
    victim's to the last digits, and the true image fits best. With secrets of its own they are as
    close as the two clients are: clients of one federation, or a shadow, whose locks share their
    signs give each other away. Gradients are compared by their cosine in the directions in which
    the shadow's own differ within a class, at unit deviation but for narrow ones, which count less.

    Where the coordinates differ altogether (pads), ``matched`` finds rotations from many victims
    under one lock (:class:`~fedkl.attacks.adaptive.matched.Matched`).

    Of noised gradients of single images, where nothing is unknown but these, candidates are weighed
    by their likelihood (:mod:`~fedkl.attacks.adaptive.noisy`).

    An update of several images or steps is taken for the sum of their gradients at the weights
    before it, of which those of all candidates of all its images are to explain as much as they
    can with weights of 0 or more (:func:`~fedkl.attacks.adaptive.mixture.parts`).

    Args:
        images: Public images (M, C, H, W) in [0, 1].
        labels: Their labels (M,).
        restandardize: None, ``global`` or ``label``, as of :class:`Shadow`, or ``matched``.
        shadows, candidates, secret_epochs, sketch, honest: As of :class:`Retrieval`; where shadows
            are the victim itself (without a lock, or holding the key) there is one.
    """

    name: ClassVar[str] = "replay"
    ways: ClassVar[tuple[str | None, ...]] = (*RESTANDARDIZATIONS, "matched")
    chancy: ClassVar[bool] = False

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        restandardize: str | None = None,
        shadows: int = 1,
        candidates: int = 1,
        secret_epochs: int = 8,
        sketch: int = 2048,
        honest: Observation | None = None,
    ) -> None:
        super().__init__(
            images,
            labels,
            restandardize=restandardize,
            shadows=shadows,
            candidates=candidates,
            secret_epochs=secret_epochs,
            epochs=1,
            sketch=sketch,
            honest=honest,
        )
        del self.settings["epochs"]

    def reconstruct(
        self,
        observations: Sequence[Observation],
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> list[Reconstruction]:
        """As :meth:`Shadow.reconstruct`, and of updates of several images or steps.

        Of these the pictures are the public images that fit best, and the labels theirs.

        Raises:
            AttackError: As there; or updates of several images are to be ``matched``, or
                are of several clients with secrets.
        """
        if not observations or observations[0].training.presentations == 1:
            found = super().reconstruct(observations, generator=generator, progress=progress)
            return self._weighed(found, observations)
        first, network = self._check_batches(observations)
        length = BATCH_SKETCH * self.sketch
        # One after the other, and twice: of large networks all of them would fill the memory.
        gradients = (gradients_of(one, network) for one in observations)
        sketch = LinearSketch(network.shared, length, generator, gradients)
        seen = torch.cat([sketch(gradients_of(one, network)) for one in observations])
        learned, read = [], []
        count = 1 if holds_all(first, network) else self.shadows
        for number in range(count):
            client = self._client(first, network, generator, (seen, None), sketch)
            side = self._side(client, sketch)
            one = Replayed.of(side, self.public.labels, BATCH_RIDGE)
            learned.append(one)
            read.append(one.read(seen))
            self._teller(number, count, progress)(float("nan"))
        return self._of_batches(learned, torch.cat(read, dim=1), first)

    def _weighed(
        self, found: list[Reconstruction], observations: Sequence[Observation]
    ) -> list[Reconstruction]:
        """By the noise, where there is some and nothing is unknown but the image."""
        first = observations[0]
        if not first.training.noise or first.kind != "gradient":
            return found
        network = Network.of(observations)
        if not holds_all(first, network):
            return found
        held = {name: first.known[name] for name in network.secrets}
        return weighed(found, observations, ShadowClient(network, held, first.num_classes))

    def _check_batches(self, observations: Sequence[Observation]) -> tuple[Observation, Network]:
        first = observations[0]
        if self.restandardize is not None:
            raise AttackError(
                f"got updates of {first.training.images} images; rotations and statistics of "
                "victims are fitted to updates of one image. Use 'replay', or audit with "
                "batch_size 1 and local_steps 1."
            )
        network = Network.of(observations)
        if first.training.clients > 1 and network.secrets:
            raise AttackError(
                f"got updates of {first.training.clients} clients, whose secrets differ; replay "
                "is for those of one client."
            )
        self.public.check(first)
        each(observations, lambda o: check_size(o, network.names))
        return first, network

    def _of_batches(
        self, learned: Sequence[Replayed], read: Tensor, first: Observation
    ) -> list[Reconstruction]:
        """One per victim, from its updates as the shadows read them (victims x T, k)."""

        def see(images: Tensor, label: int) -> Tensor:
            return torch.cat([one.whole(images, label) for one in learned], dim=1)

        gallery = _Replays(see, len(learned))
        read = gallery.beside(read)
        count, updates = first.training.images, len(first.changes)

        def together(candidates: Sequence[Tensor], classes: Tensor) -> list[Tensor]:
            scores = []
            for number, update in enumerate(read):
                mine = range(number * count, (number + 1) * count)
                names = [gallery.names(candidates[i], int(classes[i])) for i in mine]
                places = {
                    n: i for i, n in enumerate(dict.fromkeys(n for some in names for n in some))
                }
                rows = gallery.beside(torch.stack([gallery.known[name] for name in places]))
                found = parts(rows, update)
                scores += [found[[places[name] for name in some]] for some in names]
            return scores

        own = gallery.beside(torch.cat([one.every for one in learned], dim=1))
        shown = torch.stack([best(own, update, count) for update in read])
        note = f"replay of {count} images an update, taken for the sum of their gradients"
        return [
            Reconstruction(
                images=self.public.images[rows],
                labels=self.public.labels[rows],
                notes=(note, "pictures are the public images that fit best"),
                together=together,
            )
            for rows in torch.split(shown, updates)
        ]

    def _how(self, labels: Tensor) -> str | None:
        how = super()._how(labels)
        return "global" if how == "matched" and not rotated(labels) else how

    def _moved(self, side: Side, seen: Tensor, labels: Tensor, how: str | None) -> Tensor:
        return super()._moved(side, seen, labels, "global" if how == "matched" else how)

    def _learn(self, side: Side, generator: torch.Generator, tell: Callable[[float], None]) -> Any:
        known = Replayed.of(side, self.public.labels)
        tell(float("nan"))
        return known

    def _recognize(
        self, learned: Sequence[Any], moved: Sequence[Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, Gallery]:
        if self._how(labels) == "matched":
            mine = self._matched(learned).fit(moved[0], labels)
        else:
            mine = [one.within(x, labels) for one, x in zip(learned, moved, strict=True)]
        size = mine[0].shape[1]

        def see(images: Tensor, label: int) -> Tensor:
            return torch.cat([one.see(images, label)[:, :size] for one in learned], dim=1)

        own = torch.cat([one.public[:, :size] for one in learned], dim=1)
        gallery = _Replays(see, len(learned))
        return gallery.beside(torch.cat(mine, dim=1)) / len(mine), gallery.beside(own), gallery

    def _together(
        self, learned: Sequence[Any], moved: Sequence[Tensor], labels: Tensor, gallery: Gallery
    ) -> Together | None:
        assert isinstance(gallery, _Replays)
        if self._how(labels) != "matched":
            return None

        def together(candidates: Sequence[Tensor], _: Tensor) -> list[Tensor]:
            pairs = zip(candidates, labels.tolist(), strict=True)
            names = [gallery.names(images, label) for images, label in pairs]
            every = dict.fromkeys(name for mine in names for name in mine)
            places = {name: i for i, name in enumerate(every)}
            rows = torch.stack([gallery.known[name] for name in places])
            asked = [torch.tensor([places[name] for name in mine]) for mine in names]
            allowed = torch.zeros(len(asked), len(places), dtype=torch.bool)
            for row, mine in zip(allowed, asked, strict=True):
                row[mine] = True
            pool = Pool(gallery.apart(rows), torch.tensor([label for _, label in places]))
            found = self._matched(learned).fit(moved[0], labels, pool, allowed)
            read, rows = gallery.beside(torch.cat(found, dim=1)), gallery.beside(rows)
            shadows = len(learned)
            return [(rows[a] * r).sum(dim=1) / shadows for a, r in zip(asked, read, strict=True)]

        return together

    def _matched(self, learned: Sequence[Any]) -> Matched:
        pool = Pool([one.public for one in learned], self.public.labels)
        return Matched(pool, [one.within.classes for one in learned])


class _Replays(Gallery):
    """Images as several shadows see them, side by side; known as they are, embedded at unit length.

    Args:
        see: Rows (M, shadows x k) of images and their label.
        shadows: Their number.
    """

    def __init__(self, see: Callable[[Tensor, int], Tensor], shadows: int) -> None:
        super().__init__(see, labeled=True)
        self.shadows = shadows

    def embed(self, images: Tensor, label: int) -> Tensor:
        """(M, shadows x k) of images (M, C, H, W), at unit length for every shadow."""
        return self.beside(super().embed(images, label))

    def beside(self, rows: Tensor) -> Tensor:
        """Rows (M, shadows x k) at unit length for every shadow."""
        return torch.cat([normalize(side, dim=1) for side in self.apart(rows)], dim=1)

    def apart(self, rows: Tensor) -> list[Tensor]:
        """Rows (M, shadows x k) as every shadow's (M, k)."""
        return list(rows.chunk(self.shadows, dim=1))


@dataclass(frozen=True)
class Replayed:
    """A shadow, the directions in which its gradients of one class differ, and images in them.

    Attributes:
        side: The shadow.
        within: The directions.
        public: The public images (M, size).
    """

    side: Side
    within: Within
    public: Tensor

    @classmethod
    def of(cls, side: Side, labels: Tensor, ridge: float = RIDGE) -> Replayed:
        """From what the shadow gives away of public images with ``labels`` (M,).

        Raises:
            AttackError: These do not differ within any class, so that there is no direction.
        """
        x, classes = side.coordinates.enter(side.inputs), len(side.coordinates.class_means)
        within = Within(x, labels, classes, x.shape[1], ridge)
        if not bool(within.whiten.any()):
            raise AttackError(
                f"got {number_of(len(labels), 'public image')}, of which no two different images "
                "of one class tell how gradients of a class differ; give several of every class."
            )
        return cls(side, within, within(x, labels))

    def see(self, images: Tensor, label: int) -> Tensor:
        """(M, size) of images (M, C, H, W), as if their label were ``label``."""
        x = self.side.coordinates.enter(self._given_away(images, label))
        return self.within(x, torch.full((len(images),), label))

    def whole(self, images: Tensor, label: int) -> Tensor:
        """The same with the class mean, for sums over images of several classes."""
        return self.read(self._given_away(images, label))

    @property
    def every(self) -> Tensor:
        """The public images (M, size) with their class means."""
        return self.read(self.side.inputs)

    def read(self, inputs: Tensor) -> Tensor:
        """What clients gave away (N, d), with the class mean: (N, size).

        How much an update of one length was stretched is not known, nor how much one was clipped,
        so what stretching adds in these coordinates, some multiple of where nothing at all lies, is
        left out.
        """
        found = self.within.whole(self.side.coordinates.enter(inputs))
        training = self.side.client.network.training
        if training.length is None and training.clip is None:
            return found
        nothing = self.side.coordinates.enter(torch.zeros_like(inputs[:1]))
        along = normalize(self.within.whole(nothing), dim=1)
        return found - found @ along.T @ along

    def _given_away(self, images: Tensor, label: int) -> Tensor:
        labels = torch.full((len(images),), label)
        images = images.to(self.side.inputs.dtype)
        return given_away(self.side.client, images, labels, self.side.sketch)
