"""Batch-norm statistics that cross the wire, and what searches make of them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from attackhelp import CLASSES, images, observe, tiny
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import cross_entropy, one_hot

from fedkl.attacks import DLG, InvertingGradients
from fedkl.attacks.network import Network
from fedkl.attacks.statistics import misfit
from fedkl.errors import AttackError
from fedkl.observation import OPEN, Observation, Training
from fedkl.rng import derive


def victim(x: Tensor, y: Tensor, training: Training) -> Observation:
    """An update of a model with an ordinary, shared batch norm, and the buffers that come along."""
    model = tiny(norm=True)
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1, generator=derive(0, "mean"))
    changes, sent = [], []
    for mine, labels in zip(x.chunk(training.clients), y.chunk(training.clients), strict=True):
        client = deepcopy(model).train()
        optimizer = torch.optim.SGD(client.parameters(), lr=training.lr)
        for step in range(training.local_steps):
            rows = slice(step * training.batch_size, (step + 1) * training.batch_size)
            optimizer.zero_grad()
            cross_entropy(client(mine[rows]), labels[rows]).backward()
            optimizer.step()
        after = dict(client.named_parameters())
        changes.append({n: (p - after[n]).detach() for n, p in model.named_parameters()})
        sent.append({n: b.float() for n, b in client.named_buffers()})

    def mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {n: torch.stack([part[n] for part in parts]).mean(dim=0) for n in parts[0]}

    return Observation(
        model=model,
        kind="update",
        changes=(mean(changes),),
        image_shape=(1, 8, 8),
        num_classes=CLASSES,
        training=training,
        threat=OPEN,
        statistics=(mean(sent),),
    )


@pytest.mark.parametrize(
    "training",
    [
        Training(batch_size=2, lr=0.1),
        Training(batch_size=2, local_steps=3, lr=0.1),
        Training(batch_size=2, lr=0.1, clients=2),
    ],
    ids=["one step", "steps", "clients"],
)
def test_statistics_at_the_truth_are_those_that_were_sent(training: Training) -> None:
    x, y = images(training.images, (1, 8, 8)), torch.arange(training.images) % CLASSES
    observation = victim(x, y, training)
    network = Network(observation)
    seen = network.statistics.observed(observation.statistics[0])
    labels = one_hot(y, CLASSES).float()
    change, made = network.sent({}, x, labels)
    assert change.keys() == network.change({}, x, labels).keys()
    assert list(made) == list(seen) == ["1"]
    torch.testing.assert_close(made["1"], seen["1"], rtol=1e-3, atol=1e-5)
    assert float(misfit(made, seen)) < 1e-6
    others = network.sent({}, 0.5 * x + 0.2, labels)[1]
    assert float(misfit(others, seen)) > 0.01
    with network.running(1):
        torch.testing.assert_close(network.sent({}, x, labels)[1]["1"], made["1"])
    batch = vmap(lambda one: network.sent({}, one, labels)[1]["1"])(torch.stack([x, x]))
    torch.testing.assert_close(batch[0], made["1"])


def test_nothing_is_heard_where_nothing_was_sent() -> None:
    x, y = images(2, (1, 8, 8)), torch.tensor([0, 1])
    silent = replace(victim(x, y, Training(batch_size=2, lr=0.1)), statistics=())
    assert Network(silent).sent({}, x, one_hot(y, CLASSES).float())[1] == {}
    assert Network(observe(tiny(), x[:1], y[:1])[0]).statistics.rates == {}


@pytest.mark.parametrize(
    "attack",
    [InvertingGradients(iterations=300, signed=False), DLG(iterations=200, labels="infer")],
    ids=lambda a: a.name,
)
def test_shared_statistics_give_brightness_and_contrast_away(
    attack: InvertingGradients | DLG,
) -> None:
    """A norm hides both from the gradient, and its running statistics tell them."""
    x, y = 0.4 + 0.2 * images(2, (1, 8, 8)), torch.tensor([1, 3])
    told = [victim(x[i : i + 1], y[i : i + 1], Training(lr=0.1)) for i in (0, 1)]
    # Both have a model of their own by now; one call is about victims of one.
    told = [replace(one, model=told[0].model) for one in told]
    untold = [replace(one, statistics=()) for one in told]
    missed = []
    for seen in (told, untold):
        found = attack.reconstruct(seen, generator=derive(0, "a"))
        made = torch.cat([one.images[0] for one in found])
        missed.append(float((made - x).square().mean()))
    assert missed[0] < 0.1 * missed[1]


def test_observations_with_and_without_statistics_are_refused_together() -> None:
    x, y = images(2, (1, 8, 8)), torch.tensor([0, 1])
    observation = victim(x, y, Training(batch_size=2, lr=0.1))
    mixed = [observation, replace(observation, statistics=())]
    with pytest.raises(AttackError, match="statistics that others do not"):
        DLG(iterations=1).reconstruct(mixed, generator=derive(0, "a"))


def test_a_norm_without_momentum_is_passed_over() -> None:
    x, y = images(2, (1, 8, 8)), torch.tensor([0, 1])
    observation = victim(x, y, Training(batch_size=2, lr=0.1))
    assert isinstance(observation.model, nn.Sequential)
    norm = observation.model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = None
    assert Network(observation).statistics.rates == {}
