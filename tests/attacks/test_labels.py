"""Labels from gradients, where the answer is exact."""

from __future__ import annotations

import pytest
import torch
from attackhelp import CLASSES, gradient_of, images, observe, tiny
from torch import nn

from fedkl.attacks.labels import infer_counts, infer_label, infer_labels, steps_taken
from fedkl.attacks.network import Network
from fedkl.errors import AttackError
from fedkl.observation import OPEN, Observation, Training
from fedkl.rng import derive


@pytest.mark.parametrize("label", range(CLASSES))
def test_single_example(label: int) -> None:
    model = tiny()
    observation = observe(model, images(1, (1, 8, 8)), torch.tensor([label]))[0]
    assert infer_labels(observation, Network(observation)).tolist() == [[label]]


@pytest.mark.parametrize("label", range(CLASSES))
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_single_example_without_a_bias(label: int, shift: float) -> None:
    """Features of both signs, and of one."""
    generator = derive(label, "no bias")
    features = torch.randn(1, 12, generator=generator) + shift
    layer = nn.Linear(12, CLASSES, bias=False)
    torch.nn.functional.cross_entropy(layer(features), torch.tensor([label])).backward()
    assert layer.weight.grad is not None
    assert int(infer_label(layer.weight.grad, None)) == label


@pytest.mark.parametrize("labels", [[0, 0, 1, 3], [2, 2, 2, 2], [0, 1, 2, 3, 3, 3, 1, 0]])
def test_counts_are_exact_where_the_model_knows_nothing(labels: list[int]) -> None:
    y = torch.tensor(labels)
    bias = torch.full((CLASSES,), 1 / CLASSES) - torch.bincount(y, minlength=CLASSES) / len(y)
    assert infer_counts(bias, len(y)).tolist() == torch.bincount(y, minlength=CLASSES).tolist()


def test_counts_sum_to_the_batch_whatever_the_gradient() -> None:
    for seed in range(20):
        bias = torch.randn(CLASSES, generator=derive(seed, "bias"))
        counts = infer_counts(bias - bias.mean(), 7)
        assert int(counts.sum()) == 7
        assert int(counts.min()) >= 0


def test_granted_labels_are_taken() -> None:
    model = tiny()
    x, y = images(1, (1, 8, 8)), torch.tensor([2])
    seen = observe(model, x, y)[0]
    given = Observation(
        model=model, kind="gradient", changes=seen.changes, image_shape=(1, 8, 8),
        num_classes=CLASSES, training=Training(), threat=OPEN, labels=torch.tensor([[1]]),
    )  # fmt: skip
    assert infer_labels(given, Network(given)).tolist() == [[1]]


def test_without_a_classifier_the_message_says_what_to_do() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())
    x, y = images(1, (1, 8, 8)), torch.tensor([0])
    observation = Observation(
        model=model, kind="gradient", changes=(gradient_of(model, x, y),), image_shape=(1, 8, 8),
        num_classes=4, training=Training(), threat=OPEN,
    )  # fmt: skip
    with pytest.raises(AttackError, match="grant the labels"):
        infer_labels(observation, Network(observation))


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_takes_longer_steps(nesterov: bool) -> None:
    """As torch's SGD: along one gradient, 4 steps with momentum."""
    weight = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=nesterov)
    for _ in range(4):
        weight.grad = torch.ones(1)
        sgd.step()
    training = Training(local_steps=4, lr=0.1, momentum=0.9, nesterov=nesterov)
    assert -float(weight.detach()) == pytest.approx(0.1 * steps_taken(training))
    assert steps_taken(Training(local_steps=3, lr=0.1)) == 3
