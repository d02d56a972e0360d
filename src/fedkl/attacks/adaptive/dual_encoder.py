"""Which of these images made this gradient? An encoder of gradients meets one of images.

A decoder answers with a picture, and pictures that differ in what a gradient hides (brightness,
fine detail) pull it to the mean. To pick the image out of others no picture is needed: both
encoders learn, on a client of the attacker's own, that a gradient and its image are close and other
images of the class are not (InfoNCE, van den Oord et al. 2018; both ways, as Radford et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from fedkl.rng import borrowed

WIDTH: Final = 512
LENGTH: Final = 128
"""Entries of an embedding."""
NOISE: Final = 0.3  # on standardized inputs: the victim's are never quite where the shadow's are
CLIP: Final = 6.0
BATCH: Final = 256
CHUNK: Final = 500
_GRID: Final = 4  # the image encoder ends on at most 4 x 4 positions


class DualEncoder:
    """Embeddings of gradients and of images; how well two fit is their cosine.

    Args:
        inputs: Entries of a gradient's sketch in the shadow's coordinates.
        shape: (C, H, W) of the images.
        num_classes: Number of labels.
        generator: Draws weights, noise and the order of training.
    """

    def __init__(
        self,
        inputs: int,
        shape: tuple[int, ...],
        num_classes: int,
        generator: torch.Generator,
    ) -> None:
        self.num_classes, self.generator = num_classes, generator
        with borrowed(generator):
            self.of_gradients = _mlp(inputs + num_classes)
            self.of_images = _convolutions(shape)
        self.heat = nn.Parameter(torch.tensor(2.0))

    def fit(
        self,
        sketches: Tensor,
        labels: Tensor,
        images: Tensor,
        epochs: int,
        on_epoch: Callable[[float], None] = lambda loss: None,
    ) -> None:
        """Learns from the shadow's own.

        Args:
            sketches: Of its gradients, in its coordinates (N, d).
            labels: (N,).
            images: (N, C, H, W).
            epochs: Passes over them.
            on_epoch: Told the mean loss of each.
        """
        networks = (self.of_gradients, self.of_images)
        parameters = [self.heat, *(p for net in networks for p in net.parameters())]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
        steps = epochs * -(-len(sketches) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        for net in networks:
            net.train()
        with borrowed(self.generator):
            for _ in range(epochs):
                losses = []
                for rows in self._batches(labels):
                    noise = NOISE * torch.randn(sketches[rows].shape)
                    loss = self._loss(sketches[rows] + noise, labels[rows], images[rows])
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    schedule.step()
                    losses.append(float(loss.detach()))
                on_epoch(sum(losses) / max(1, len(losses)))
        for net in networks:
            net.eval()

    def _loss(self, sketches: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        logits = (
            self.heat.exp() * self._read(sketches, labels) @ normalize(self.of_images(images)).T
        )
        # Only images of the same class are candidates: the label leaks anyway.
        logits = logits.masked_fill(labels[:, None] != labels[None], -torch.inf)
        own = torch.arange(len(labels))
        return cross_entropy(logits, own) + cross_entropy(logits.T, own)

    def _batches(self, labels: Tensor) -> list[Tensor]:
        """Everything in batches of as few classes as fill one: many candidates of the same class.

        Classes come in pairs, the images of a pair mixed, so that large ones are not alone.
        """
        rows = []
        for pair in torch.split(torch.randperm(self.num_classes), 2):
            mine = torch.isin(labels, pair).nonzero().flatten()
            rows.append(mine[torch.randperm(len(mine))])
        found = torch.split(torch.cat(rows), BATCH)
        return [found[i] for i in torch.randperm(len(found)).tolist()]

    def _read(self, sketches: Tensor, labels: Tensor) -> Tensor:
        known = one_hot(labels, self.num_classes).to(sketches.dtype)
        inputs = torch.cat([sketches.clamp(-CLIP, CLIP), known], dim=1)
        return normalize(self.of_gradients(inputs))

    def read(self, sketches: Tensor, labels: Tensor) -> Tensor:
        """Embeddings (N, 128) of sketches (N, d) in the shadow's coordinates, with labels (N,)."""
        with torch.no_grad():
            return self._read(sketches, labels)

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (M, 128) of images (M, C, H, W); their cosine with a gradient's is the fit."""
        with torch.no_grad():
            chunks = [normalize(self.of_images(x)) for x in torch.split(images, CHUNK)]
        return torch.cat(chunks)


def _mlp(inputs: int) -> nn.Module:
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


def _convolutions(shape: tuple[int, ...]) -> nn.Module:
    channels, *size = shape
    layers: list[nn.Module] = []
    for before, after in ((channels, 32), (32, 64), (64, 128)):
        conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
        layers += [conv, nn.GroupNorm(8, after), nn.GELU()]
        size = [-(-side // 2) for side in size]
    if max(size) > _GRID:
        size = [min(side, _GRID) for side in size]
        layers.append(nn.AdaptiveAvgPool2d((size[0], size[1])))
    flat = nn.Linear(128 * size[0] * size[1], WIDTH)
    return nn.Sequential(*layers, nn.Flatten(), flat, nn.GELU(), nn.Linear(WIDTH, LENGTH))
