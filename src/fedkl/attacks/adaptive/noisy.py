"""Candidates weighed by the noise on an update, where nothing is unknown but the image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fedkl.attacks.adaptive.retrieval import Gallery
from fedkl.attacks.adaptive.shadow_client import ShadowClient
from fedkl.attacks.base import Reconstruction
from fedkl.observation import Observation

NOTE: Final = "candidates weighed by the noise: whose whole update is nearest to what was sent"


class Likelihood:
    """How well candidates fit noised updates of one image: by the likelihood of white noise.

    Of update s and made update g it is -|s - g|² / 2 up to what all candidates share, so
    g·s - |g|²/2. Where g is right to rounding no other way to choose among candidates is better.
    Cosines of sketches, and directions of unit deviation, waste what noise leaves: it is as large
    along every entry.

    Args:
        observations: The victims: gradients of one image each, of one model.
        client: Who makes the updates of candidates: the victim itself, secrets included.
    """

    def __init__(self, observations: Sequence[Observation], client: ShadowClient) -> None:
        self.client, self.names = client, client.network.names
        self.changes = [change for one in observations for change in one.changes]

    def together(self, candidates: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
        """As ``Reconstruction.together``: scores (K,) of each update's candidates (K, C, H, W)."""
        return self._of([*range(len(self.changes))], candidates, labels)

    def score(self, row: int, label: int, candidates: Tensor) -> Tensor:
        """Scores (K,) of candidates of the update in that row, if its label is ``label``."""
        return self._of([row], [candidates], torch.tensor([label]))[0]

    def _of(
        self, rows: Sequence[int], candidates: Sequence[Tensor], labels: Tensor
    ) -> list[Tensor]:
        found = [torch.empty(0)] * len(rows)
        for label in sorted({*labels.tolist()}):
            mine = (labels == label).nonzero().flatten().tolist()
            # The same images are candidates of many victims: made once, and the same for all.
            images: dict[tuple[bytes, int], Tensor] = {}
            namer = Gallery(lambda x, _: x, labeled=True)
            asked = []
            for i in mine:
                asked.append(namer.names(candidates[i], label))
                images |= dict(zip(asked[-1], candidates[i], strict=True))
            places = {name: place for place, name in enumerate(images)}
            scores = self._scores([rows[i] for i in mine], torch.stack([*images.values()]), label)
            for column, (i, names) in enumerate(zip(mine, asked, strict=True)):
                found[i] = scores[[places[name] for name in names], column]
        return found

    def _scores(self, rows: Sequence[int], images: Tensor, label: int) -> Tensor:
        """(M, rows) of images (M, C, H, W)."""
        sent = {n: torch.stack([self.changes[row][n] for row in rows]) for n in self.names}
        labels = torch.full((len(images),), label)
        parts = []
        for made in self.client.gradients(images, labels):
            part = torch.zeros(len(made[self.names[0]]), len(rows), dtype=torch.float64)
            for name in self.names:
                mine, theirs = made[name].flatten(1), sent[name].flatten(1)
                part += (mine @ theirs.T).double()
                part -= mine.double().square().sum(dim=1, keepdim=True) / 2
            parts.append(part)
        return torch.cat(parts)


def weighed(
    found: Sequence[Reconstruction], observations: Sequence[Observation], client: ShadowClient
) -> list[Reconstruction]:
    """Reconstructions whose candidates are asked about by :class:`Likelihood`."""
    likelihood = Likelihood(observations, client)
    made, row = [], 0
    for one in found:
        first, labels = row, one.labels.flatten().tolist()

        def score(
            update: int, candidates: Tensor, at: int = first, of: Sequence[int] = labels
        ) -> Tensor:
            return likelihood.score(at + update, of[update], candidates)

        notes = (*one.notes, NOTE)
        made.append(
            dataclasses.replace(one, score=score, together=likelihood.together, notes=notes)
        )
        row += len(labels)
    return made
