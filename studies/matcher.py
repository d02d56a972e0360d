"""An attacker that is given the candidates: which of these images made this gradient?

A decoder answers with a picture, and pictures that differ in what a gradient hides (brightness,
fine detail) pull it to the mean. Identification does not need a picture: two networks, one for
sketches of gradients and one for images, are trained on a client of the attacker's own so that a
gradient and its image meet, among images of the same class (InfoNCE, van den Oord et al. 2018).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from fedkl.rng import borrowed

WIDTH, LENGTH = 512, 128
NOISE = 0.3  # on standardized inputs: the victim's are never quite where the shadow's are


class Matcher:
    """Trained pairs of a gradient's and an image's embedding; scores are their cosines.

    Args:
        inputs: Entries of an aligned input (:meth:`Coordinates.align`).
        shape: (C, H, W) of the images.
        classes: Number of labels.
        generator: Draws the networks and the order of training.
    """

    def __init__(
        self, inputs: int, shape: tuple[int, ...], classes: int, generator: torch.Generator
    ) -> None:
        self.classes, self.generator = classes, generator
        with borrowed(generator):
            self.of_gradient = _tower(inputs + classes)
            self.of_image = _images(shape[0])
            self.heat = nn.Parameter(torch.tensor(2.0))
        self.pool = torch.empty(0)

    def fit(self, aligned: Tensor, labels: Tensor, images: Tensor, epochs: int) -> None:
        """Learns from the attacker's own (N, d), (N,) and (N, C, H, W)."""
        networks = (self.of_gradient, self.of_image)
        parameters = [self.heat, *(p for net in networks for p in net.parameters())]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
        steps = epochs * (len(aligned) // 256)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        for net in networks:
            net.train()
        with borrowed(self.generator):
            for _ in range(epochs):
                for rows in self._batches(labels):
                    noise = NOISE * torch.randn(aligned[rows].shape)
                    a = self._read(aligned[rows] + noise, labels[rows])
                    b = self._embed(images[rows])
                    logits = self.heat.exp() * a @ b.T
                    # Only images of the same class are candidates.
                    other = labels[rows][:, None] != labels[rows][None]
                    logits = logits.masked_fill(other, -torch.inf)
                    target = torch.arange(len(rows))
                    loss = cross_entropy(logits, target) + cross_entropy(logits.T, target)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        for net in networks:
            net.eval()

    def _batches(self, labels: Tensor) -> list[Tensor]:
        """Batches of 256 images of two classes each: more candidates of the same class."""
        found = []
        order = torch.randperm(self.classes)
        for pair in torch.split(order, 2):
            rows = torch.isin(labels, pair).nonzero().flatten()
            found += list(torch.split(rows[torch.randperm(len(rows))], 256))
        return [found[i] for i in torch.randperm(len(found)).tolist() if len(found[i]) > 1]

    def _read(self, aligned: Tensor, labels: Tensor) -> Tensor:
        known = one_hot(labels, self.classes).to(aligned.dtype)
        return normalize(self.of_gradient(torch.cat([aligned.clamp(-6, 6), known], dim=1)))

    def _embed(self, images: Tensor) -> Tensor:
        return normalize(self.of_image(images))

    def look_at(self, pool: Tensor) -> None:
        """Remembers the candidates (M, C, H, W)."""
        with torch.no_grad():
            self.pool = torch.cat([self._embed(x) for x in torch.split(pool, 500)])

    def scores(self, aligned: Tensor, labels: Tensor, candidates: Tensor) -> Tensor:
        """(N, K): how well each candidate (N, K), row of what was looked at, fits."""
        with torch.no_grad():
            read = self._read(aligned, labels)
            return torch.einsum("nd,nkd->nk", read, self.pool[candidates])


def _tower(inputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, WIDTH),
        nn.LayerNorm(WIDTH),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(WIDTH, WIDTH),
        nn.LayerNorm(WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, LENGTH),
    )


def _images(channels: int) -> nn.Module:
    layers: list[Any] = []
    for before, after in ((channels, 32), (32, 64), (64, 128)):
        conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
        layers += [conv, nn.GroupNorm(8, after), nn.GELU()]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.LazyLinear(WIDTH), nn.GELU(), nn.Linear(WIDTH, LENGTH)
    )
