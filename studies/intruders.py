"""Attackers of `studies/breakpad.py` on many single-image updates under one pad."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, instance_norm

from fedkl import metrics
from fedkl.attacks.adaptive.dual_encoder import DualEncoder
from fedkl.attacks.adaptive.shadow import distance_of_means, given_away
from fedkl.attacks.adaptive.shadow_client import Public, ShadowClient, train_secrets
from fedkl.attacks.adaptive.shadow_decoder import Coordinates, Decoder
from fedkl.attacks.adaptive.sketch import Sketch, gradients_of
from fedkl.attacks.adaptive.transport import Transport
from fedkl.attacks.closed_form import penultimate_features
from fedkl.attacks.network import Network
from fedkl.audit import victims as audited
from fedkl.audit.config import AuditConfig
from fedkl.audit.observe import observe
from fedkl.federation.session import load_data
from fedkl.locking.pad import SCALE_LAWS
from fedkl.observation import threat_of
from fedkl.rng import derive

WAYS = ("global", "label", "average", "transport")
MATCHER_EPOCHS = 30


@dataclass
class Trained:
    """A client the attacker can look into, and what was learned on it."""

    inputs: Tensor
    decoder: Decoder
    transport: Transport
    encoder: DualEncoder | None = None
    pool: Tensor | None = None


class Bench:
    """Victims of one client, what they gave away, and attackers that decode it.

    Args:
        config, folder: A finished run.
        victims: Test images, each in an update of its own.
        public: Images the attacker trains on.
        sketch: Length of a gradient's sketch; None: the classifier's input.
        matching: Whether the attacker picks among the candidates itself, instead of drawing an
            image that is compared with them.
    """

    kind: type[Sketch] = Sketch

    def __init__(
        self,
        config: Any,
        folder: Path,
        victims: int,
        *,
        public: int,
        sketch: int | None = None,
        matching: bool = False,
    ) -> None:
        self.matching = matching
        self.config, self.folder = config, folder
        self.bundle = load_data(config)
        self.audit = AuditConfig(run=config, images=victims)
        self.owner = owner = audited.Victims(config, folder, self.bundle, self.audit)
        self.rows = rows = audited.draw_victims(self.bundle, self.audit)
        self.truth, self.labels = self.bundle.test.batch(rows.flatten())
        self.pool, classes = self.bundle.test.batch(torch.arange(len(self.bundle.test)))
        self.decoys = metrics.draw_decoys(
            self.labels, classes, generator=derive(0, "decoys"), own=rows.flatten(), count=99
        )
        self.first = self._observed(rows[:1])[0]
        self.network = Network(self.first)
        self.sketch = (
            None if sketch is None else self.kind(self.network.shared, sketch, derive(0, "sketch"))
        )
        self.seen, self.held = self._given_away(rows), owner.held()
        self.public = Public(*self.bundle.public.batch(torch.arange(public)))

    def _observed(self, rows: Tensor) -> list[Any]:
        return observe(self.owner, [self.owner.send(row) for row in rows], threat_of("adaptive"))

    def _given_away(self, rows: Tensor) -> Tensor:
        """What updates of these victims tell: the classifier's input, or a gradient's sketch."""
        found = []
        for observed in self._observed(rows):
            if self.sketch is None:
                found.append(penultimate_features(observed, self.network))
            else:
                found.append(self.sketch(gradients_of(observed, self.network)))
        return torch.cat(found)

    def renewals(self, clients: Sequence[Trained], every: int, steps: int) -> dict[str, float]:
        """Identification from the victims of many pads pooled (:meth:`renewed`), by way."""
        everyone, pooled = torch.arange(len(self.rows)), self.renewed(every, steps)
        found = {"plain": self._hits([self._closest(clients, pooled, everyone)], pooled, everyone)}
        found |= self._every_way(clients, pooled, everyone)
        return {way: _share(hits) for way, hits in found.items()}

    def renewed(self, every: int, steps: int) -> Tensor:
        """What victims give away if every pad serves ``every`` of them.

        The client renews as in a federation: what it learned on top starts again, and the lock
        alone takes ``steps`` steps on the client's own images. The stem stays.
        """
        space, (key, private) = self.owner.workspace, self.owner.owners[0]
        one = space.training
        seen = []
        for number, rows in enumerate(torch.split(self.rows, every)):
            space.enter(self.owner.shared, key, private)
            space.renew(key)
            space.images, space.training = self.bundle.train, self.config.training
            mine, lr = self.owner.session.parts[0], self.config.training.lr
            generator = derive(0, "renewal", number)
            space.join(self.owner.shared, mine, generator, lr, steps=steps)
            space.images, space.training = self.bundle.test, one
            private = {name: tensor.clone() for name, tensor in space.private.items()}
            self.owner.owners[0] = key, private
            seen.append(self._given_away(rows))
        return torch.cat(seen)

    def shuffled(self) -> Tensor:
        """What victims gave away, exchanged within classes: nobody can find anyone by it."""
        seen, generator = self.seen.clone(), derive(0, "shuffled")
        for label in self.labels.unique().tolist():
            rows = (self.labels == label).nonzero().flatten()
            order = rows[torch.randperm(len(rows), generator=generator)]
            seen[order] = self.seen[order.roll(1)]  # nobody's own
        return seen

    def identified(self, images: Tensor) -> float:
        """Share of victims found among 100 of their class."""
        return _share(metrics.identified(images, self.truth, self.pool, self.decoys))

    def floor(self) -> float:
        """The same for the class mean of all public images."""
        images, labels = self.bundle.public.batch(torch.arange(len(self.bundle.public)))
        return self.identified(metrics.class_mean_floor(images, labels, self.labels))

    def holding_the_key(self) -> float:
        """The positive control: the decoder learned with the victim's own secrets."""
        own, everyone = self._trained(self.held, 0), torch.arange(len(self.seen))
        return _share(self._hits([own], self.seen, everyone))

    def shadows(self, count: int, epochs: int) -> list[Trained]:
        """Clients of the attacker's own."""
        return [self._trained(self.own(seed, epochs), seed) for seed in range(count)]

    def own(self, seed: int, epochs: int) -> dict[str, Tensor]:
        """Secrets that the attacker trained."""
        return train_secrets(
            self.first,
            self.public,
            generator=derive(seed, "shadow"),
            epochs=epochs,
            network=self.network,
        )

    def insider(self) -> list[Trained]:
        """Another client of the federation, which decodes with its own lock."""
        return [self._trained(self.inside(), 99)]

    def inside(self) -> dict[str, Tensor]:
        """Secrets of another client."""
        two = dataclasses.replace(self.audit, aggregated=2)
        both = audited.Victims(self.config, self.folder, self.bundle, two).held()
        return {name: held[1] for name, held in both.items()}

    def curves(
        self, clients: Sequence[Trained], counts: Sequence[int]
    ) -> dict[str, dict[str, float]]:
        """Identification by number of pooled victims and way of bringing them into coordinates.

        The victims are dealt into groups of that number; each group is attacked by its own
        statistics alone. ``1`` takes none.
        """
        everyone = torch.arange(len(self.seen))
        alone = [_share(self._hits([client], self.seen, everyone)) for client in clients]
        found = {"1": {"plain": max(alone)}}
        for count in counts:
            parts = [
                self._every_way(clients, self.seen[part], part)
                for part in torch.split(everyone, count)
            ]
            found[str(count)] = {way: _share(torch.cat([p[way] for p in parts])) for way in WAYS}
        return found

    def _every_way(
        self, clients: Sequence[Trained], seen: Tensor, who: Tensor
    ) -> dict[str, Tensor]:
        """Hits by way; ``seen`` is what the victims ``who`` gave away under one lock."""
        best = self._closest(clients, seen, who)
        return {
            way: self._hits(clients if way == "average" else [best], seen, who, way) for way in WAYS
        }

    def _closest(self, clients: Sequence[Trained], seen: Tensor, who: Tensor) -> Trained:
        mine, labels = self.public.labels, self.labels[who]
        return min(clients, key=lambda c: distance_of_means(c.inputs, mine, seen, labels, 10))

    def _hits(
        self, clients: Sequence[Trained], seen: Tensor, who: Tensor, way: str | None = None
    ) -> Tensor:
        """Which of the victims ``who`` are found, by all ``clients`` together: bool (N,)."""
        labels, shape = self.labels[who], self.first.image_shape
        moved = [self._moved(client, seen, labels, way) for client in clients]
        if not self.matching:
            drawn = [
                c.decoder.decode(x, labels, shape) for c, x in zip(clients, moved, strict=True)
            ]
            mean = torch.stack(drawn).mean(dim=0)
            return metrics.identified(mean, self.truth[who], self.pool, self.decoys[who])
        candidates = torch.cat([self.rows[who].reshape(-1, 1), self.decoys[who]], dim=1)
        scores = [_scores(c, x, labels, candidates) for c, x in zip(clients, moved, strict=True)]
        mean = torch.stack(scores).mean(dim=0)
        return mean[:, 0] > mean[:, 1:].amax(dim=1)

    def _trained(self, secrets: dict[str, Tensor], seed: int) -> Trained:
        client = ShadowClient(self.network, secrets, self.first.num_classes)
        images, labels = self.public.images, self.public.labels
        inputs = given_away(client, images, labels, self.sketch)
        coordinates = Coordinates.of(inputs, labels, 10)
        generator = derive(seed, "decoder")
        decoder = Decoder(coordinates, 10, hidden=512, epochs=8)
        transport = Transport(coordinates.enter(inputs), labels, 10)
        if not self.matching:
            decoder.fit(inputs, labels, images, generator)
            return Trained(inputs, decoder, transport)
        encoder = DualEncoder(inputs.shape[1], self.first.image_shape, 10, generator)
        encoder.fit(coordinates.enter(inputs), labels, images, MATCHER_EPOCHS)
        return Trained(inputs, decoder, transport, encoder, encoder.embed(self.pool))

    def _moved(self, client: Trained, seen: Tensor, labels: Tensor, way: str | None) -> Tensor:
        """What victims gave away, in the client's coordinates."""
        coordinates = client.decoder.coordinates
        if way == "transport":
            return client.transport.move(coordinates.align(seen, labels, "global"), labels)
        return coordinates.align(seen, labels, "label" if way == "average" else way)


def _scores(client: Trained, seen: Tensor, labels: Tensor, candidates: Tensor) -> Tensor:
    """How well each candidate (N, K), row of the pool, fits what victims gave away: (N, K)."""
    assert client.encoder is not None
    assert client.pool is not None
    read = client.encoder.read(seen, labels)
    return torch.einsum("nd,nkd->nk", read, client.pool[candidates])


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def likelihood(
    config: Any, folder: Path, trials: int, law: str, spread: float, *, candidates: int = 100
) -> dict[str, float]:
    """Who is given z = γ·x̂ + β and the stem, and knows the law: how often the image is found.

    γ and β as drawn, nothing learned on top. The density of z at a position is half that of
    N(m·x̂, d²·x̂² + s²) and half that of N(-m·x̂, ...), for γ = ±|m + d·N| and β = s·N.
    """
    bundle = load_data(config)
    audit = AuditConfig(run=config, images=trials, candidates=candidates)
    held = audited.Victims(config, folder, bundle, audit).held()
    rows = audited.draw_victims(bundle, audit).flatten()
    _, labels = bundle.test.batch(rows)
    decoys = metrics.draw_decoys(
        labels,
        bundle.test.labels,
        generator=derive(0, "decoys"),
        own=rows,
        count=candidates - 1,
    )
    generator = derive(0, "likelihood", law, str(spread))
    mean, deviation = SCALE_LAWS[law]
    found = 0
    for i in range(trials):
        images, _ = bundle.test.batch(torch.cat([rows[i : i + 1], decoys[i]]))
        x = conv2d(images, held["conv1.weight"], held["conv1.bias"], stride=2, padding=2)
        x = instance_norm(x).double()
        shape = x.shape[1:]
        sign = torch.randint(2, shape, generator=generator) * 2 - 1
        scale = sign * (mean + deviation * torch.randn(shape, generator=generator)).abs()
        z = scale * x[0] + spread * torch.randn(shape, generator=generator)
        variance = deviation**2 * x.square() + spread**2
        both = torch.stack([-((z - s * mean * x) ** 2) / (2 * variance) for s in (1, -1)])
        score = (both.logsumexp(dim=0) - variance.log() / 2).flatten(1).sum(dim=1)
        found += int(score.argmax() == 0)
    return {"identified": found / trials, "trials": trials}
