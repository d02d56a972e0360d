"""Labels from gradients, where the answer is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from attackhelp import CLASSES, gradient_of, images, observe, tiny
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkl.attacks import Attack, Counted, Progress, Reconstruction
from fedkl.attacks.labels import (
    infer_counts,
    infer_label,
    infer_labels,
    mean_probability,
)
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


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("label", [0, 1])
def test_without_a_bias_the_row_below_zero_is_the_labels_where_two_are_as_long(
    classes: int, label: int
) -> None:
    """Of two classes; or of more, where the model is sure of a wrong one."""
    features = torch.rand(1, 12, generator=derive(label, "sure"))
    layer = nn.Linear(12, classes, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[1 - label] = 20.0
    cross_entropy(layer(features), torch.tensor([label])).backward()
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


@pytest.mark.parametrize("expected", [None, torch.tensor([0.75, 0.25])])
def test_counts_of_a_gradient_that_fits_no_label_sum_to_the_batch(expected: Tensor | None) -> None:
    counts = infer_counts(torch.tensor([0.9, 0.9]), 8, expected)
    assert counts.tolist() == ([4, 4] if expected is None else [6, 2])


@pytest.mark.parametrize("nesterov", [False, True])
def test_gradient_of_one_step_is_what_sgd_was_given(nesterov: bool) -> None:
    weight = nn.Parameter(torch.tensor([3.0, -2.0]))
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.5}
    sgd = torch.optim.SGD([weight], **settings)  # type: ignore[arg-type]
    before = weight.detach().clone()
    weight.grad = torch.tensor([0.25, 1.5])
    sgd.step()
    found = Training(**settings).gradient(before - weight.detach(), before)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor([0.25, 1.5]))


def test_granted_labels_are_taken() -> None:
    model = tiny()
    x, y = images(1, (1, 8, 8)), torch.tensor([2])
    seen = observe(model, x, y)[0]
    given = Observation(
        model=model, kind="gradient", changes=seen.changes, image_shape=(1, 8, 8),
        num_classes=CLASSES, training=Training(), threat=OPEN, labels=torch.tensor([[1]]),
    )  # fmt: skip
    assert infer_labels(given, Network(given)).tolist() == [[1]]


def test_at_one_length_one_image_tells_its_label_and_a_batch_no_counts() -> None:
    one, *_ = observe(tiny(), images(1, (1, 8, 8)), torch.tensor([2]))
    seen = replace(one, training=Training(length=0.1))
    assert infer_labels(seen, Network(seen)).tolist() == [[2]]
    batch = replace(seen, training=Training(batch_size=2, length=0.1))
    with pytest.raises(AttackError, match="sent at one length"):
        infer_labels(batch, Network(batch))
    given = replace(batch, labels=torch.tensor([[1, 2]]))
    assert infer_labels(given, Network(given)).tolist() == [[1, 2]]


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
    assert -float(weight.detach()) == pytest.approx(0.1 * training.steps_taken)
    assert Training(local_steps=3, lr=0.1).steps_taken == 3


OFTEN = (0.5, 0.3, 0.15, 0.05)


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images that tell nothing of their labels, which are not equally frequent."""
    labels = torch.multinomial(
        torch.tensor(OFTEN), count, replacement=True, generator=derive(seed, "labels")
    )
    return images(count, (1, 8, 8), seed), labels


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A model that has learned how frequent classes are, as any does first."""
    model = tiny()
    x, y = drawn(256, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def batch(model: nn.Module, seed: int, size: int = 8) -> tuple[Observation, list[int]]:
    x, y = drawn(size, seed)
    seen = observe(model, x[:1], y[:1])[0]
    changes = (gradient_of(model, x, y),)
    return replace(seen, changes=changes, training=Training(batch_size=size)), y.sort()[0].tolist()


def test_labels_of_a_batch_at_a_trained_model(trained: nn.Module) -> None:
    """Batch 8: exact with public images, wrong as long as every class is taken to be as likely."""
    public = drawn(200, 2)[0]
    right, without = 0, 0
    for seed in range(100, 120):
        observation, labels = batch(trained, seed)
        network = Network(observation)
        expected = mean_probability(network, public)
        # A share is rounded right if it is off by less than half of 1/8.
        own = network.logits(network.shared, drawn(8, seed)[0]).softmax(dim=1).mean(dim=0)
        assert float((own - expected).abs().max()) < 0.04
        assert infer_labels(observation, network, expected).tolist() == [labels]
        right += 1
        without += infer_labels(observation, network).tolist() == [labels]
    assert right == 20
    assert without < 10


class Look(Attack):
    """Keeps what it is given."""

    name = "look"

    def reconstruct(
        self,
        observations: Sequence[Observation],
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> list[Reconstruction]:
        self.seen = list(observations)
        return [Reconstruction(torch.zeros(1, 8, 1, 8, 8), torch.zeros(1, 8))] * len(self.seen)


def test_counted_labels_reach_the_attack(trained: nn.Module) -> None:
    public, look = drawn(200, 2)[0], Look()
    batches = [batch(trained, seed) for seed in (100, 101)]
    granted = replace(batches[0][0], labels=torch.full((1, 8), 3))
    attack = Counted(look, public)
    (note, *_) = attack.reconstruct(
        [*(one for one, _ in batches), granted], generator=derive(0, "a")
    )[0].notes
    assert "200 public images" in note
    assert [o.labels.tolist() for o in look.seen if o.labels is not None] == [
        [batches[0][1]], [batches[1][1]], [[3] * 8],
    ]  # fmt: skip
    assert attack.name == "look"


def test_secrets_with_which_the_layers_classify_are_taken() -> None:
    """The output of a model depends on its private tensors, and so does what it expects."""
    model = tiny(norm=True)
    x, y = drawn(8, 0)
    observation = replace(
        observe(model, x[:1], y[:1])[0],
        changes=(gradient_of(model, x, y),),
        training=Training(batch_size=8),
        secrets=("4.bias",),
    )
    network = Network(observation)
    expected = mean_probability(network, x)
    rare = int(expected.argmin())
    given = {"4.bias": torch.eye(CLASSES)[rare] * 30}
    assert float(expected[rare]) < 0.3
    assert float(mean_probability(network, x, given)[rare]) > 0.99
