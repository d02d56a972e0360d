"""A client of the attacker's own: the victim's shared layers, other secrets, public images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy, one_hot

from fedkl.attacks.adaptive.laws import draw_affines, draw_secrets
from fedkl.attacks.labels import classifier
from fedkl.attacks.network import Network
from fedkl.errors import AttackError, ConfigError
from fedkl.locking import LockSpec
from fedkl.observation import Observation

Tensors = Mapping[str, Tensor]

NUMBERS: Final = 2**26
"""Gradient entries of one chunk: 256 MiB in float32, and three times that while they are made."""


@dataclass(frozen=True)
class Public:
    """Labeled images that anyone may have.

    Attributes:
        images: float32 (M, C, H, W) in [0, 1].
        labels: int64 (M,).
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or len(self.images) < 2 or len(self.images) != len(self.labels):
            raise ConfigError(
                f"got public images {tuple(self.images.shape)} and labels "
                f"{tuple(self.labels.shape)}; expected (M, C, H, W) and (M,) with M of 2 or more."
            )

    def __repr__(self) -> str:
        return f"Public({len(self.images)} images)"


def train_secrets(
    observation: Observation,
    public: Public,
    *,
    generator: torch.Generator,
    epochs: int = 3,
    lr: float = 0.05,
    batch_size: int = 64,
    network: Network | None = None,
) -> dict[str, Tensor]:
    """Secrets of a client of the attacker's own: with them the shared layers classify.

    They start from the lock spec's law and are trained with Adam on public images; the shared
    layers stay as they are. To those the victim's secrets belong too, so both resemble each other
    in as much as the shared layers leave no choice.

    Returns:
        Every secret by name; empty if the model has none.
    """
    net = network or Network(observation)
    if not net.secrets:
        return {}
    start = dict(net.secrets)
    if observation.spec is not None:
        spec = LockSpec.from_dict(observation.spec)
        if draw_affines(spec, generator):
            start = draw_secrets(spec, start, generator)
    secrets = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam(list(secrets.values()), lr=lr)
    steps = epochs * (len(public.images) // batch_size or 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(epochs):
        order = torch.randperm(len(public.images), generator=generator)
        for rows in torch.split(order, batch_size):
            if len(rows) < min(batch_size, len(order)):
                continue  # every step has a full batch, so that the schedule ends at zero
            optimizer.zero_grad(set_to_none=True)
            logits = net.logits({**net.shared, **secrets}, public.images[rows])
            loss = cross_entropy(logits, public.labels[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return {name: value.detach() for name, value in secrets.items()}


class ShadowClient:
    """What a client with given secrets would send of single images; the attacker can look inside.

    Args:
        network: The victim's public model.
        secrets: Every private tensor by name.
        num_classes: Length of the model's output.
        chunk: Images per evaluation at most; of large networks fewer, for memory
            (:data:`NUMBERS`).
    """

    def __init__(
        self, network: Network, secrets: Tensors, num_classes: int, *, chunk: int = 256
    ) -> None:
        self.network, self.secrets = network, dict(secrets)
        self.num_classes = num_classes
        size = sum(value.numel() for value in network.shared.values())
        self.chunk = max(1, min(chunk, NUMBERS // max(1, size)))

    def features(self, images: Tensor) -> Tensor:
        """Inputs of the classifier (N, features), every image in a batch of its own."""
        weight, _ = classifier(self.network, self.num_classes)
        module = self.network.model.get_submodule(weight.rpartition(".")[0])
        parameters = {**self.network.shared, **self.secrets}
        seen: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

        def look(x: Tensor) -> Tensor:
            seen.clear()
            self.network.run(parameters, x[None])
            return seen[-1].reshape(-1)

        try:
            with torch.no_grad():
                return torch.cat([vmap(look)(x) for x in torch.split(images, self.chunk)])
        finally:
            handle.remove()

    def gradients(self, images: Tensor, labels: Tensor) -> Iterator[dict[str, Tensor]]:
        """Gradients of the shared parameters, per image, chunk by chunk: each name (n, *shape)."""
        network, secrets, classes = self.network, self.secrets, self.num_classes

        def loss(shared: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return network.loss({**shared, **secrets}, x[None], y[None])

        each = vmap(grad(loss), in_dims=(None, 0, 0))
        for rows in torch.split(torch.arange(len(images)), self.chunk):
            y = one_hot(labels[rows], classes).to(images.dtype)
            yield each(network.shared, images[rows], y)


def check_single(observation: Observation) -> None:
    """Raises unless every update is one step on one image.

    Raises:
        AttackError: It is not.
    """
    training = observation.training
    if training.images != 1 or training.local_steps != 1:
        raise AttackError(
            f"got updates of batch {training.batch_size} and {training.local_steps} steps; what a "
            "shadow learns is for one image and one step. Audit with batch_size 1 and "
            "local_steps 1, or use an attack that searches."
        )
