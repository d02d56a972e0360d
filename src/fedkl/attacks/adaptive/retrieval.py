"""The retrieval attack: out of given images, the one that a gradient was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedkl.attacks.adaptive.dual_encoder import DualEncoder
from fedkl.attacks.adaptive.shadow import Shadow, Side
from fedkl.attacks.base import Reconstruction, Together
from fedkl.observation import Observation


class Retrieval(Shadow):
    """A shadow that recognizes images in place of drawing them.

    It learns on its own client which image fits which gradient
    (:class:`~fedkl.attacks.adaptive.dual_encoder.DualEncoder`), so that it can be asked which of
    several images of the victim's class was there (``Reconstruction.score``). As picture it shows
    the public image that fits best, of the victim's class where there is one: that tells what the
    victim's resembles.

    Args:
        images: Public images (M, C, H, W) in [0, 1].
        labels: Their labels (M,).
        restandardize: As of :class:`Shadow`.
        shadows: Clients of the attacker's own; their scores are averaged.
        candidates: Sets of secrets tried for each, as of :class:`Shadow`.
        secret_epochs: Passes over the public images to train secrets.
        epochs: Passes over them to train the encoders.
        sketch: Length that a gradient is sketched to.
        honest: As of :class:`Shadow`.
    """

    name: ClassVar[str] = "retrieval"

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        restandardize: str | None = None,
        shadows: int = 1,
        candidates: int = 1,
        secret_epochs: int = 3,
        epochs: int = 30,
        sketch: int = 2048,
        honest: Observation | None = None,
    ) -> None:
        super().__init__(
            images,
            labels,
            variant="gradient",
            restandardize=restandardize,
            shadows=shadows,
            candidates=candidates,
            secret_epochs=secret_epochs,
            hidden=0,
            epochs=epochs,
            sketch=sketch,
            honest=honest,
        )
        for unused in ("variant", "hidden"):
            del self.settings[unused]

    def _learn(self, side: Side, generator: torch.Generator, tell: Callable[[float], None]) -> Any:
        images, labels = self.public.images, self.public.labels
        classes = len(side.coordinates.class_means)
        encoder = DualEncoder(side.inputs.shape[1], tuple(images.shape[1:]), classes, generator)
        encoder.fit(side.coordinates.enter(side.inputs), labels, images, self.epochs, tell)
        return encoder

    def _answers(
        self,
        learned: Sequence[Any],
        moved: Sequence[Tensor],
        labels: Sequence[Tensor],
        notes: tuple[str, ...],
    ) -> list[Reconstruction]:
        notes = (*notes, "pictures are the public images that fit best")
        every = torch.cat([*labels])
        read, own, gallery = self._recognize(learned, moved, every)
        together = self._together(learned, moved, every, gallery)
        best = self.public.images[self._closest(read, own, every)]
        updates = [len(mine) for mine in labels]
        return [
            Reconstruction(
                images=x[:, None],
                labels=y[:, None],
                notes=notes,
                score=partial(_scored, gallery, r, y),
                together=together,
            )
            for x, y, r in zip(
                torch.split(best, updates), labels, torch.split(read, updates), strict=True
            )
        ]

    def _recognize(
        self, learned: Sequence[Any], moved: Sequence[Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, Gallery]:
        """Updates (N, k), public images (M, k), and what does the same of any others.

        The inner product of two is how well they fit: the cosine, averaged over shadows.
        """
        pairs = list(zip(learned, moved, strict=True))
        # Of embeddings side by side, at unit length each.
        read = torch.cat([encoder.read(x, labels) for encoder, x in pairs], dim=1) / len(pairs)

        def embed(images: Tensor, label: int) -> Tensor:
            return torch.cat([encoder.embed(images) for encoder in learned], dim=1)

        return read, embed(self.public.images, 0), Gallery(embed, labeled=False)

    def _together(
        self, learned: Sequence[Any], moved: Sequence[Tensor], labels: Tensor, gallery: Gallery
    ) -> Together | None:
        """``Reconstruction.together``, where candidates of all tell more than those of one."""
        return None

    def _closest(self, read: Tensor, own: Tensor, labels: Tensor) -> Tensor:
        """Which public image fits best, int64 (N,): of the class, if there is one of it."""
        other = labels[:, None] != self.public.labels[None]
        other &= ~other.all(dim=1, keepdim=True)
        return (read @ own.T).masked_fill(other, -torch.inf).argmax(dim=1)


class Gallery:
    """Images as all shadows see them side by side, made once of each.

    The same images are candidates of many victims.

    Args:
        make: Rows (M, k) of images (M, C, H, W) and the label that an update of theirs has.
        labeled: Whether the rows depend on that label.
    """

    def __init__(self, make: Callable[[Tensor, int], Tensor], *, labeled: bool) -> None:
        self.make, self.labeled = make, labeled
        self.known: dict[tuple[bytes, int], Tensor] = {}

    def embed(self, images: Tensor, label: int) -> Tensor:
        """(M, k) of images (M, C, H, W)."""
        return torch.stack([self.known[name] for name in self.names(images, label)])

    def names(self, images: Tensor, label: int) -> list[tuple[bytes, int]]:
        """What the images are ``known`` by, from now on."""
        names = [(_fingerprint(image), label if self.labeled else -1) for image in images]
        new = {name: i for i, name in enumerate(names) if name not in self.known}
        if new:
            made = self.make(images[list(new.values())], label)
            self.known |= dict(zip(new, made, strict=True))
        return names


def _fingerprint(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().cpu().numpy().tobytes(), digest_size=16).digest()


def _scored(
    gallery: Gallery, read: Tensor, labels: Tensor, update: int, candidates: Tensor
) -> Tensor:
    """``Reconstruction.score`` of the victim whose updates are ``read`` (T, ...)."""
    # Row by row: the same image has the same score to the last bit, whatever stands beside it.
    rows = gallery.embed(candidates.to(read.dtype), int(labels[update]))
    return (rows * read[update]).sum(dim=1)
