"""Attackers of `studies/breakpad.py` that repeat the victim's step on images in question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from intruders import Bench
from shapes import ShapedSketch, Shapes
from torch import Tensor
from torch.nn.functional import normalize

from fedkl.attacks.adaptive.matched import Matched, Pool
from fedkl.attacks.adaptive.relations import Relations, SizedSketch, settled
from fedkl.attacks.adaptive.replay import Replayed
from fedkl.attacks.adaptive.shadow import Side, given_away
from fedkl.attacks.adaptive.shadow_client import ShadowClient
from fedkl.attacks.adaptive.shadow_decoder import Coordinates

WAYS = ("plain", "matched", "candidates")
CLASSES = 10


class Replayer:
    """A client the attacker can look into: public images, and all that may be candidates."""

    def __init__(self, bench: Bench, secrets: dict[str, Tensor]) -> None:
        client, public = ShadowClient(bench.network, secrets, CLASSES), bench.public
        inputs = given_away(client, public.images, public.labels, bench.sketch)
        coordinates = Coordinates.of(inputs, public.labels, CLASSES)
        known = Replayed.of(Side(client, bench.sketch, coordinates, inputs), public.labels)
        self.coordinates, self.within, self.public = coordinates, known.within, known.public
        labels = bench.bundle.test.labels
        pool = given_away(client, bench.pool, labels, bench.sketch)
        self.pool = known.within(coordinates.enter(pool), labels)


class ReplayBench(Bench):
    """Victims, and how often several replayers together find them.

    plain
        Gradients compared as they are.
    matched
        Brought into the replayers' coordinates by rotations that public images tell
        (`replay-matched`), within groups of ``n`` victims under one lock.
    candidates
        The same rotations, improved by guessing among each victim's own candidates.
    """

    _for: Sequence[Replayer] = ()

    def replayers(self, count: int, epochs: int) -> list[Replayer]:
        """Shadows."""
        return [Replayer(self, self.own(seed, epochs)) for seed in range(count)]

    def rates(self, clients: Sequence[Replayer], counts: Sequence[int]) -> dict[str, Any]:
        """Identification by number of pooled victims and way."""
        everyone = torch.arange(len(self.seen))
        found: dict[str, Any] = {"1": {"plain": self._rate(clients, self.seen, everyone, None)}}
        for count in counts:
            parts = torch.split(everyone, count)
            found[str(count)] = {
                way: sum(self._rate(clients, self.seen[p], p, way) * len(p) for p in parts)
                / len(everyone)
                for way in WAYS[1:]
            }
        return found

    def pooled(self, clients: Sequence[Replayer], seen: Tensor) -> dict[str, float]:
        """Identification of all victims by what they gave away, ``seen``, pooled; by way."""
        everyone = torch.arange(len(seen))
        ways = {"plain": None, "matched": "matched", "candidates": "candidates"}
        return {name: self._rate(clients, seen, everyone, way) for name, way in ways.items()}

    def _rate(
        self, clients: Sequence[Replayer], seen: Tensor, who: Tensor, way: str | None
    ) -> float:
        labels = self.labels[who]
        asked = torch.cat([self.rows[who].reshape(-1, 1), self.decoys[who]], dim=1)
        if way is None:
            moved = [c.within(c.coordinates.enter(seen), labels) for c in clients]
        else:
            matched, images = self._pools(clients)
            standard = clients[0].coordinates.align(seen, labels, "global")
            if way == "candidates":
                allowed = torch.zeros(len(who), len(self.pool), dtype=torch.bool)
                allowed.scatter_(1, asked, True)
                moved = matched.fit(standard, labels, images, allowed)
            else:
                moved = matched.fit(standard, labels)
        scores = torch.stack(
            [
                torch.einsum(
                    "nd,nkd->nk",
                    normalize(m, dim=1),
                    normalize(c.pool[:, : m.shape[1]][asked], dim=2),
                )
                for c, m in zip(clients, moved, strict=True)
            ]
        ).sum(dim=0)
        return float((scores[:, 0] > scores[:, 1:].amax(dim=1)).double().mean())

    def _pools(self, clients: Sequence[Replayer]) -> tuple[Matched, Pool]:
        """Public images and all candidates as these clients see them; made once."""
        if self._for is not clients:
            public = Pool([c.public for c in clients], self.public.labels)
            self._matched = Matched(public, [c.within.classes for c in clients])
            self._images = Pool([c.pool for c in clients], self.bundle.test.labels)
            self._for = clients
        return self._matched, self._images


class RelationBench(Bench):
    """Victims, and how often their sizes and relations alone tell them (`replay-relations`).

    ``1`` is by the size of one gradient. Of more under one pad, ``pairs`` is by relations alone,
    as if the client sent gradients of one size, and ``both`` by both.
    """

    kind = SizedSketch

    def sides(self, secrets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What a client with these secrets gives away of public images, and of all candidates."""
        client = ShadowClient(self.network, secrets, CLASSES)
        tests = self.bundle.test.labels
        return (
            given_away(client, self.public.images, self.public.labels, self.sketch),
            given_away(client, self.pool, tests, self.sketch),
        )

    def rates(
        self, clients: Sequence[tuple[Tensor, Tensor]], counts: Sequence[int]
    ) -> dict[str, Any]:
        """Identification by number of victims under one pad; one client is the victim itself."""
        relations = Relations([c[0] for c in clients], self.public.labels, CLASSES)
        rows = torch.stack([c[1] for c in clients], dim=1)
        asked = torch.cat([self.rows.reshape(-1, 1), self.decoys], dim=1)
        everyone = torch.arange(len(self.seen))
        alone = torch.cat(
            [
                relations.by_size(self.seen[p], self.labels[p], rows[asked[p]])
                for p in torch.split(everyone, 16)
            ]
        )
        found: dict[str, Any] = {"1": {"size": _first(alone)}}
        for count in counts:
            # At 64 a group takes half a minute, so half of them has to do.
            here = everyone[: len(everyone) // 2] if count > 16 else everyone
            scores: dict[str, list[Tensor]] = {"pairs": [], "both": []}
            for who in torch.split(here, count):
                pairs = relations.by_pairs(self.seen[who], self.labels[who], rows[asked[who]])
                scores["both"].append(settled(alone[who], pairs))
                scores["pairs"].append(settled(torch.zeros_like(alone[who]), pairs))
            found[str(count)] = {way: _first(torch.cat(every)) for way, every in scores.items()}
        return found


class ShapeBench(RelationBench):
    """Victims, and how often one gradient tells them: by its size, and by what else it has."""

    kind = ShapedSketch

    def alone(self, clients: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Identification by way; one client is the victim itself."""
        asked = torch.cat([self.rows.reshape(-1, 1), self.decoys], dim=1)
        found = {}
        for way, which in self.sketch.parts.items():
            shapes = Shapes(torch.stack([c[0][:, which] for c in clients]), self.public.labels)
            pool = torch.stack([c[1][:, which] for c in clients], dim=1)
            scores = [
                shapes.score(self.seen[p, which], self.labels[p], pool[asked[p]])
                for p in torch.split(torch.arange(len(self.seen)), 100)
            ]
            found[way] = _first(torch.cat(scores))
        return found


def _first(scores: Tensor) -> float:
    """How often the first of the candidates (N, K) scores above all others."""
    return float((scores[:, 0] > scores[:, 1:].amax(dim=1)).double().mean())
