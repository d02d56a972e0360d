"""A client of the attacker's own: the victim's shared layers, other secrets, public images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy, one_hot

from fedkl.attacks.adaptive.laws import draw_affines, draw_secrets
from fedkl.attacks.labels import classifier
from fedkl.attacks.network import Network
from fedkl.attacks.sending import as_sent
from fedkl.errors import AttackError, ConfigError, number_of
from fedkl.locking import LockSpec
from fedkl.observation import Observation

Tensors = Mapping[str, Tensor]

NUMBERS: Final = 2**26
"""Gradient entries of one chunk: 256 MiB in float32, and three times that while they are made."""


@dataclass(frozen=True)
class Public:
    """Labeled images that anyone may have: where they come into every attack that knows a lock.

    Attributes:
        images: float32 (M, C, H, W) in [0, 1].
        labels: int64 (M,); given as integers of any size.

    Raises:
        ConfigError: Shapes or dtypes that do not fit, or a label below 0.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or len(images) < 2 or labels.shape != images.shape[:1]:
            raise ConfigError(
                f"got public images {tuple(images.shape)} and labels {tuple(labels.shape)}; "
                "expected (M, C, H, W) and (M,) with M of 2 or more."
            )
        if not images.is_floating_point():
            raise ConfigError(
                f"got public images of {images.dtype}; expected float32 in [0, 1]. Convert bytes "
                "with images.float() / 255."
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ConfigError(
                f"got public labels of {labels.dtype}; expected integers, the class of every "
                "image. Convert them with labels.long(), or one-hot rows with argmax(dim=1)."
            )
        object.__setattr__(self, "labels", labels.long())
        if int(self.labels.min()) < 0:
            raise ConfigError(
                f"got public labels from {int(self.labels.min())} to {int(self.labels.max())}; "
                "expected classes of 0 or more. Leave out images without a class."
            )

    def check(self, observation: Observation) -> None:
        """Raises unless the victim's model takes these images and has these classes.

        Raises:
            AttackError: It does not; says which.
        """
        shape, classes = tuple(self.images.shape[1:]), observation.num_classes
        if shape != observation.image_shape:
            raise AttackError(
                f"got public images of {shape}, the victim's are {observation.image_shape}; give "
                "public images of that shape."
            )
        if int(self.labels.max()) >= classes:
            raise AttackError(
                f"got public labels from {int(self.labels.min())} to {int(self.labels.max())}, and "
                f"the victim's model has {classes} classes; expected labels within 0 … "
                f"{classes - 1}. Give public images of these classes, or leave the others out."
            )

    def __repr__(self) -> str:
        return f"Public({number_of(len(self.images), 'image')})"


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

    Raises:
        AttackError: The public images do not fit the victim's model (:meth:`Public.check`).
    """
    public.check(observation)
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
        """Gradients of the shared parameters, per image, chunk by chunk: each name (n, *shape).

        Where victims send updates of one image, with what they remove of theirs.
        """
        network, secrets, classes = self.network, self.secrets, self.num_classes
        training = network.training
        single = training.presentations == 1
        told = replace(
            training,
            length=None,  # which sketches take away themselves
            prune_ratio=training.prune_ratio if single else None,
            # The change of weights is another number than the gradient.
            clip=training.clip if single and network.kind == "gradient" else None,
        )

        def loss(shared: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return network.loss({**shared, **secrets}, x[None], y[None])

        def sent(shared: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return as_sent(grad(loss)(shared, x, y), told)

        each = vmap(sent, in_dims=(None, 0, 0))
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
            f"got updates of batch {training.batch_size} and "
            f"{number_of(training.local_steps, 'step')}; what a shadow learns is for one image "
            "and one step. Audit with batch_size 1 and "
            "local_steps 1, or use an attack that searches."
        )
