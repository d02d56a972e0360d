"""The relations attack: sizes of gradients, and how those of a few victims lie to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedkl.attacks.adaptive.relations import Relations, SizedSketch
from fedkl.attacks.adaptive.retrieval import Gallery, Retrieval
from fedkl.attacks.adaptive.shadow import Side, given_away
from fedkl.attacks.adaptive.sketch import Sketch, gradients_of
from fedkl.attacks.base import Reconstruction
from fedkl.attacks.network import Network
from fedkl.errors import ConfigError, number_of
from fedkl.observation import Observation


class ReplayRelations(Retrieval):
    """A replay that compares what secrets cannot scramble, so that it needs no coordinates.

    Across pads the gradients of one image by two clients look nothing alike. Yet both are large
    where the network errs, and two images that it mistakes for the same class have gradients that
    point alike, whoever's they are. So every candidate is weighed by the size of the victim's
    gradient and, all candidates of ``group`` victims under one lock at once, by the cosines among
    their gradients, against what clients of the attacker's own make of the same images
    (:class:`~fedkl.attacks.adaptive.relations.Relations`). One gradient alone tells its size;
    updates that are sent at one length tell only how they lie to each other.

    Args:
        images: Public images (M, C, H, W) in [0, 1].
        labels: Their labels (M,).
        group: Victims under one lock that are taken together; the rest of a division as well.
        shadows: Clients of the attacker's own, 2 or more.
        candidates, secret_epochs, sketch, honest: As of :class:`Retrieval`.
    """

    name: ClassVar[str] = "replay-relations"
    ways: ClassVar[tuple[str | None, ...]] = (None,)
    chancy: ClassVar[bool] = False

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        group: int = 16,
        shadows: int = 4,
        candidates: int = 1,
        secret_epochs: int = 8,
        sketch: int = 2048,
        honest: Observation | None = None,
    ) -> None:
        if group < 1 or shadows < 2:
            raise ConfigError(
                f"got groups of {number_of(group, 'victim')} and {number_of(shadows, 'shadow')}; "
                "expected 1 or more victims, and 2 or more shadows, which tell how far clients "
                "agree."
            )
        super().__init__(
            images,
            labels,
            shadows=shadows,
            candidates=candidates,
            secret_epochs=secret_epochs,
            epochs=1,
            sketch=sketch,
            honest=honest,
        )
        del self.settings["epochs"]
        self.group = self.settings["group"] = group

    def _given_away(
        self, observations: Sequence[Observation], network: Network, generator: torch.Generator
    ) -> tuple[Tensor, Sketch | None]:
        sketch = SizedSketch(network.shared, self.sketch, generator)
        return torch.cat([sketch(gradients_of(one, network)) for one in observations]), sketch

    def _moved(self, side: Side, seen: Tensor, labels: Tensor, how: str | None) -> Tensor:
        return seen

    def _learn(self, side: Side, generator: torch.Generator, tell: Callable[[float], None]) -> Any:
        tell(float("nan"))
        return side

    def _answers(
        self,
        learned: Sequence[Any],
        moved: Sequence[Tensor],
        labels: Sequence[Tensor],
        notes: tuple[str, ...],
    ) -> list[Reconstruction]:
        seen, every = moved[0], torch.cat([*labels])
        sides = [side.inputs for side in learned]
        client = learned[0].client
        sized = client.network.sized
        relations = Relations(sides, self.public.labels, client.num_classes, sized=sized)
        gallery = Gallery(partial(_as_shadows_see, learned), labeled=True)
        shown = self._resembling(relations, torch.stack(sides, dim=1), seen, every)
        together = partial(_together, relations, gallery, self.group, seen, every)
        parts = [torch.split(x, [len(mine) for mine in labels]) for x in (shown, seen)]
        notes = (*notes, "pictures are the public images that fit best")
        return [
            Reconstruction(
                images=self.public.images[rows][:, None],
                labels=mine[:, None],
                notes=notes,
                score=partial(_by_size, relations, gallery, x, mine),
                together=together,
            )
            for rows, x, mine in zip(*parts, labels, strict=True)
        ]

    def _resembling(
        self, relations: Relations, sides: Tensor, seen: Tensor, labels: Tensor
    ) -> Tensor:
        """Which public image, as the shadows see them (M, shadows, k), is as large: int64 (N,).

        Of the class, if there is one of it.
        """
        found = torch.empty(len(seen), dtype=torch.int64)
        for label in sorted({*labels.tolist()}):
            mine = (labels == label).nonzero().flatten()
            rows = (self.public.labels == label).nonzero().flatten()
            rows = rows if len(rows) else torch.arange(len(sides))
            scores = relations.by_size(seen[mine], labels[mine], sides[rows][None])
            found[mine] = rows[scores.argmax(dim=1)]
        return found


def _as_shadows_see(learned: Sequence[Side], images: Tensor, label: int) -> Tensor:
    """What every shadow gives away of images (M, C, H, W) of a class: (M, shadows, 1 + k)."""
    labels = torch.full((len(images),), label)
    images = images.to(learned[0].inputs.dtype)
    return torch.stack([given_away(s.client, images, labels, s.sketch) for s in learned], dim=1)


def _by_size(
    relations: Relations,
    gallery: Gallery,
    seen: Tensor,
    labels: Tensor,
    update: int,
    candidates: Tensor,
) -> Tensor:
    """``Reconstruction.score`` of the victim whose updates are ``seen`` (T, 1 + k)."""
    rows = gallery.embed(candidates.to(seen.dtype), int(labels[update]))
    here = slice(update, update + 1)
    return relations.by_size(seen[here], labels[here], rows[None])[0]


def _together(
    relations: Relations,
    gallery: Gallery,
    group: int,
    seen: Tensor,
    labels: Tensor,
    candidates: Sequence[Tensor],
    _: Tensor,
) -> list[Tensor]:
    """``Reconstruction.together``: ``group`` victims after the other, each with its candidates."""
    scores: list[Tensor] = []
    for mine in torch.split(torch.arange(len(seen)), group):
        rows = [gallery.embed(candidates[i].to(seen.dtype), int(labels[i])) for i in mine.tolist()]
        scores += relations.together(seen[mine], labels[mine], rows)
    return scores
