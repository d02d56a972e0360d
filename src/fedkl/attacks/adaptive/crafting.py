"""A server that sends weights of its own making, so that one class stands out of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedkl.attacks.base import Attack, Progress, Reconstruction, each
from fedkl.attacks.labels import classifier
from fedkl.attacks.network import Network
from fedkl.errors import AttackError, ConfigError
from fedkl.observation import Observation

NOTE = "the server sent crafted weights (class fishing)"


def craft(
    state: Mapping[str, Tensor], target: int, *, weight: str, bias: str, margin: float = 30.0
) -> dict[str, Tensor]:
    """The shared state that a server sends to fish for images of one class.

    Class fishing (Wen et al. 2022, "Fishing for User Data in Large-Batch Federated Learning via
    Gradient Magnification"): in the classifier the rows of all classes but ``target`` are zeroed
    and the target's bias is far below the others'. Every image then is given a probability of the
    target of almost 0. What comes down through the classifier is (p_t - [y = t])·w_t: nothing
    from images of other classes, all of w_t from those of the target. Works on any model whose
    classifier is shared and has a bias.

    Args:
        state: The honest shared state; stays as it is.
        target: The class to fish for.
        weight: Name of the classifier's weight (classes, features).
        bias: Name of its bias (classes,).
        margin: How far the target's logit is put below the others', in nats, for features within
            [0, 1]; larger features take a larger margin.

    Raises:
        ConfigError: A name, class or margin that does not fit.
    """
    for name, ndim in ((weight, 2), (bias, 1)):
        if name not in state or state[name].ndim != ndim:
            raise ConfigError(
                f"{name!r} is no tensor of {ndim} dimension(s) in the shared state; give the names "
                "of the classifier's weight and bias (a private head cannot be crafted)."
            )
    classes = len(state[bias])
    if not 0 <= target < classes or margin <= 0:
        raise ConfigError(
            f"got target {target} and margin {margin}; expected a class within 0 … {classes - 1} "
            "and a positive margin."
        )
    crafted = {name: tensor.clone() for name, tensor in state.items()}
    row = state[weight][target].clone()
    crafted[weight].zero_()
    crafted[weight][target] = row
    crafted[bias].zero_()
    # Below zero by the margin even where the features agree with the row as well as they can.
    crafted[bias][target] = -margin - float(row.clamp_min(0).sum())
    return crafted


class Fishing(Attack):
    """Any attack for single images, on batches of a model that was sent crafted weights.

    Of a batch with one image of the target class the crafted classifier leaves that image's
    gradient alone: of the layers below the classifier directly, and of the classifier through its
    target row, which holds the image's features. The observation is turned into that of the one
    image, and ``attack`` is carried out on it. Exact where images do not meet within a batch;
    through a batch norm in train mode the others still matter for mean and variance. Several
    images of the class come out mixed.

    Args:
        attack: Gets observations of batch size 1, label given.
        target: The class that was fished for.
    """

    name: str  # type: ignore[misc]  # of two parts, so it belongs to the value

    def __init__(self, attack: Attack, target: int) -> None:
        super().__init__(attack=attack, target=target)
        self.attack, self.target = attack, target
        self.name = f"{attack.name}+fishing"

    def reconstruct(
        self,
        observations: Sequence[Observation],
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> list[Reconstruction]:
        """As :meth:`Attack.reconstruct`, but with one image per update, that of the class.

        Raises:
            AttackError: Updates of several steps, or no image of the class in a batch.
        """
        single = each(observations, lambda o: catch(o, self.target))
        found = self.attack.reconstruct(single, generator=generator, progress=progress)
        note = f"{NOTE}; the image is that of class {self.target}"
        return [replace(r, notes=(*r.notes, note)) for r in found]


def catch(observation: Observation, target: int) -> Observation:
    """The observation that the batch's one image of class ``target`` would have made by itself.

    Args:
        observation: Gradients of batches at crafted weights.
        target: The class that :func:`craft` was given.

    Raises:
        AttackError: The update is of several steps or pruned, or no image of the class was in it.
    """
    training = observation.training
    if observation.kind != "gradient" and training.local_steps != 1:
        raise AttackError(
            f"got updates of {training.local_steps} steps; after the first one the weights are no "
            "longer those that were crafted. Fish with local_steps 1."
        )
    if training.prune_ratio:
        raise AttackError(
            f"got updates {training.altered}; one image is read off the whole gradient of the "
            "classifier. Attack them without crafted weights."
        )
    network = Network(observation)
    weight, bias = classifier(network, observation.num_classes)
    if bias is None:
        raise AttackError(f"the classifier {weight} has no bias; class fishing needs one.")
    changes = tuple(_caught(change, network, observation, target) for change in observation.changes)
    return replace(
        observation,
        kind="gradient",
        changes=changes,
        training=replace(
            training,
            batch_size=1,
            local_steps=1,
            repeats=False,
            clients=1,
            length=None,
            clip=None,
        ),
        labels=torch.full((observation.count, 1), target),
        statistics=(),  # those are of the whole batch
    )


def _caught(
    change: Mapping[str, Tensor], network: Network, observation: Observation, target: int
) -> dict[str, Tensor]:
    training = observation.training
    gradient = {name: change[name] for name in network.shared}
    if observation.kind == "update":
        gradient = {n: training.gradient(g, network.shared[n]) for n, g in gradient.items()}
    weight, bias = classifier(network, observation.num_classes)
    assert bias is not None
    # The target row is -(1/B)·sum of features over its images; its bias tells how many. What a
    # rescaled update has in it of the class is taken to be one.
    images = training.batch_size * training.clients
    count = -gradient[bias][target] * images
    unsized = training.length is not None or training.clip is not None
    if unsized and float(count) > 0:
        gradient = {name: g / count for name, g in gradient.items()}
        count = torch.ones_like(count)
    if float(count) < 0.5:
        raise AttackError(
            f"no image of class {target} was in the batch (its bias gradient says {float(count):g} "
            "of them); fish for another class, or wait for another batch."
        )
    single = {name: g * (images / count) for name, g in gradient.items()}
    features = single[weight][target] / single[bias][target]
    p = network.shared[bias].softmax(dim=0)  # w_t·features is far below the margin
    miss = p.clone()
    miss[target] = miss[target] - 1
    single[weight], single[bias] = torch.outer(miss, features), miss
    return single
