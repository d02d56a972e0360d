"""The public model as a function: gradients and unrolled updates against plain torch."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from attackhelp import CLASSES, gradient_of, images, observe, tiny
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.functional import cross_entropy, one_hot

from fedkl.attacks import InvertingGradients
from fedkl.attacks.network import MANY, Network
from fedkl.errors import AttackError
from fedkl.observation import OPEN, Observation, Training
from fedkl.rng import derive


@pytest.mark.parametrize("norm", [False, True])
def test_gradient_is_that_of_autograd(norm: bool) -> None:
    model = tiny(norm=norm)
    x, y = images(3, (1, 8, 8)), torch.tensor([0, 3, 1])
    network = Network(observe(model, x[:1], y[:1])[0])
    made = network.gradient({}, x, one_hot(y, CLASSES).float())
    for name, seen in gradient_of(model, x, y).items():
        torch.testing.assert_close(made[name], seen, rtol=1e-4, atol=1e-6)


def test_many_victims_at_once_are_each_alone() -> None:
    model = tiny(norm=True)
    x, y = images(4, (1, 8, 8)), torch.tensor([0, 3, 1, 2])
    network = Network(observe(model, x[:1], y[:1])[0])
    labels = one_hot(y, CLASSES).float()
    together = vmap(lambda a, b: network.gradient({}, a[None], b[None]))(x, labels)
    for i in range(4):
        alone = network.gradient({}, x[i : i + 1], labels[i : i + 1])
        for name, value in alone.items():
            torch.testing.assert_close(together[name][i], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "training",
    [
        Training(batch_size=2, local_steps=3, lr=0.1),
        Training(batch_size=2, local_steps=3, lr=0.1, momentum=0.9, weight_decay=0.01),
        Training(batch_size=2, local_steps=2, lr=0.1, momentum=0.9, nesterov=True),
        Training(batch_size=2, local_steps=2, lr=0.1, repeats=True),
    ],
    ids=["plain", "momentum", "nesterov", "repeats"],
)
def test_unrolled_update_is_that_of_sgd(training: Training) -> None:
    model = tiny(norm=True)
    x = images(training.images, (1, 8, 8))
    y = torch.arange(training.images) % CLASSES
    trained = deepcopy(model).train()
    optimizer = torch.optim.SGD(
        trained.parameters(),
        lr=training.lr,
        momentum=training.momentum,
        nesterov=training.nesterov,
        weight_decay=training.weight_decay,
    )
    for step in range(training.local_steps):
        at = 0 if training.repeats else 2 * step
        optimizer.zero_grad()
        cross_entropy(trained(x[at : at + 2]), y[at : at + 2]).backward()
        optimizer.step()
    after = dict(trained.named_parameters())
    change = {n: (p - after[n]).detach() for n, p in model.named_parameters()}
    network = Network(
        Observation(
            model=model,
            kind="update",
            changes=(change,),
            image_shape=(1, 8, 8),
            num_classes=CLASSES,
            training=training,
            threat=OPEN,
        )
    )
    made = network.change({}, x, one_hot(y, CLASSES).float())
    for name, seen in change.items():
        torch.testing.assert_close(made[name], seen, rtol=1e-3, atol=1e-6)


def test_victims_model_is_not_touched() -> None:
    model = tiny(norm=True)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    x, y = images(2, (1, 8, 8)), torch.tensor([0, 1])
    observation = observe(model, x[:1], y[:1])[0]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    Network(observation).gradient({}, x, one_hot(y, CLASSES).float())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c: c.pop("0.weight"), "lacks 0.weight"),
        (lambda c: c.update({"0.weight": torch.zeros(2)}), "has shape"),
        (lambda c: c["0.weight"].fill_(float("nan")), "NaN"),
    ],
    ids=["missing", "shape", "nan"],
)
def test_update_that_does_not_fit_is_refused(spoil: object, message: str) -> None:
    model = tiny()
    observation = observe(model, images(1, (1, 8, 8)), torch.tensor([0]))[0]
    spoil(observation.changes[0])  # type: ignore[operator]
    with pytest.raises(AttackError, match=message):
        Network(observation)


@pytest.mark.parametrize("lr", [0.0, -0.1, float("nan")])
def test_an_update_whose_rate_is_not_given_is_refused(lr: float) -> None:
    observation = observe(tiny(), images(1, (1, 8, 8)), torch.tensor([0]))[0]
    training = Training(lr=lr)
    Network(replace(observation, training=training))  # of a gradient the rate is no part
    with pytest.raises(AttackError, match=r"learning rate of .*expected a positive.*Training\(lr="):
        Network(replace(observation, kind="update", training=training))


@pytest.mark.parametrize("kind", ["gradient", "update"])
def test_plain_autograd_gives_the_same_change_and_derivative_by_image_and_secret(kind: str) -> None:
    model = tiny(norm=True)
    steps = Training() if kind == "gradient" else Training(local_steps=2, lr=0.1, momentum=0.9)
    x, y = images(steps.images, (1, 8, 8)), torch.arange(steps.images)
    observation = observe(model, x[:1], y[:1])[0]
    network = Network(replace(observation, kind=kind, training=steps, secrets=("1.weight",)))
    labels = one_hot(y, CLASSES).float()

    def size(scale: Tensor, pixels: Tensor) -> Tensor:
        change = network.change({"1.weight": scale}, pixels, labels)
        return torch.stack([value.square().sum() for value in change.values()]).sum()

    wanted = grad(size, argnums=(0, 1))(torch.full((6,), 1.5), x)
    scale, pixels = torch.full((6,), 1.5).requires_grad_(), x.clone().requires_grad_()
    with network.running(1):
        found = torch.autograd.grad(size(scale, pixels), [scale, pixels])
    for mine, theirs in zip(found, wanted, strict=True):
        assert bool((theirs != 0).any())
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
    # The ways of batches, few and many.
    for trials in (0, 2, MANY):
        scales, batch = torch.full((2, 6), 1.5), torch.stack([x, x])
        with network.running(trials):
            many = vmap(grad(size, argnums=(0, 1)))(scales, batch)
        for mine, theirs in zip(many, wanted, strict=True):
            torch.testing.assert_close(mine, torch.stack([theirs] * 2), rtol=1e-3, atol=1e-4)


class Forgetting(nn.Module):
    """Drops by functions, not modules, with rates that stay on in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, bias=False), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout2d(F.conv2d(input=x, weight=self.conv.weight), 0.5)
        y = F.dropout(input=torch.dropout(y, 0.5, train=True).flatten(2), p=0.5)
        y = y.transpose(1, 2)
        y = F.scaled_dot_product_attention(y, y, y, None, 0.5)
        y = F.scaled_dot_product_attention(y, y, y, dropout_p=0.5)
        out: Tensor = self.fc(y.mean(dim=1))
        return out


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention under vmap
@pytest.mark.parametrize("trials", [1, 2, MANY])
def test_nothing_is_dropped_by_functions_either(trials: int) -> None:
    model = Forgetting()
    observation = observe(model, images(1, (1, 8, 8)), torch.tensor([0]))[0]
    network = Network(observation)
    x, y = images(1, (1, 8, 8)), one_hot(torch.tensor([0]), CLASSES).float()
    with network.running(trials):
        if trials == 1:
            first, second = (network.gradient({}, x, y) for _ in range(2))
        else:
            first, second = (
                vmap(lambda image: network.gradient({}, image, y))(x.expand(trials, 1, 1, 8, 8))
                for _ in range(2)
            )
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(bool(g.isfinite().all()) for g in first.values())


class Dropping(nn.Module):
    """Dropout, and two outputs, as some of torchvision's classifiers have in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(64, CLASSES), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(self.drop(x.flatten(1)))
        return y, 2 * y


def test_dropout_and_auxiliary_outputs_are_attacked_as_well() -> None:
    model, x, y = Dropping(), images(2, (1, 8, 8)), torch.tensor([1, 3])
    seen = []
    for i in range(2):
        model.zero_grad()
        cross_entropy(model(x[i : i + 1])[0], y[i : i + 1]).backward()
        change = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        seen.append(
            Observation(
                model=model,
                kind="gradient",
                changes=(change,),
                image_shape=(1, 8, 8),
                num_classes=CLASSES,
                training=Training(),
                threat=OPEN,
            )
        )
    found = InvertingGradients(iterations=3).reconstruct(seen, generator=derive(0, "a"))
    assert [int(one.labels) for one in found] == [1, 3]
    assert model.drop.p == 0.5  # of the victim; the attacker works on a copy


def test_instance_norms_that_keep_statistics_are_attacked_as_well() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(4 * 64, CLASSES),
    )
    x, y = images(2, (1, 8, 8)), torch.tensor([1, 3])
    seen = observe(model, x, y)
    before = {name: value.clone() for name, value in model.named_buffers()}
    network = Network(seen[0])
    made = network.gradient({}, x[:1], one_hot(y[:1], CLASSES).float())
    for name, value in seen[0].changes[0].items():
        torch.testing.assert_close(made[name], value, rtol=1e-4, atol=1e-6)
    found = InvertingGradients(iterations=3).reconstruct(seen, generator=derive(0, "a"))
    assert [int(one.labels) for one in found] == [1, 3]
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_a_model_that_does_not_run_on_many_trials_says_so() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(F.rrelu(x.flatten(1) - 0.5, training=True))
            return y

    seen = observe(Leaky(), images(2, (1, 8, 8)), torch.tensor([1, 3]))
    with pytest.raises(AttackError, match=r"rrelu.*parallel=1"):
        InvertingGradients(iterations=2).reconstruct(seen, generator=derive(0, "a"))
    alone = InvertingGradients(iterations=2, parallel=1)
    assert len(alone.reconstruct(seen, generator=derive(0, "a"))) == 2


def test_an_output_without_logits_is_refused() -> None:
    class Odd(Dropping):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"logits": super().forward(x)[0]}

    (seen,) = observe(tiny(), images(1, (1, 8, 8)), torch.tensor([1]))
    model = Odd()
    change = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    odd = replace(seen, model=model, changes=(change,))
    with pytest.raises(AttackError, match="returns a dict"):
        InvertingGradients(iterations=1).reconstruct([odd], generator=derive(0, "a"))


class Attentive(nn.Module):
    """Attention as transformers have it, by torch's module and by its function."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[:, 0])
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + F.scaled_dot_product_attention(x, x, x)
        out: Tensor = self.head(x.mean(1))
        return out


def test_attention_alone_and_at_once_and_differentiated_twice() -> None:
    """Fused kernels have no second derivative, which every search takes, and no rule for vmap."""
    torch.manual_seed(0)
    model = Attentive()
    x, y = images(3, (1, 8, 8)), torch.tensor([0, 3, 1])
    network = Network(observe(model.eval(), x[:1], y[:1])[0])
    labels = one_hot(y, CLASSES).float()
    together = vmap(lambda a, b: network.gradient({}, a[None], b[None]))(x, labels)
    for i in range(3):
        rows = slice(i, i + 1)
        alone = network.gradient({}, x[rows], labels[rows])
        for name, seen in gradient_of(model, x[rows], y[rows]).items():
            torch.testing.assert_close(alone[name], seen, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(together[name][i], seen, rtol=1e-4, atol=1e-6)
    pixels = x[:1].clone().requires_grad_()
    total = sum(g.square().sum() for g in network.gradient({}, pixels, labels[:1]).values())
    (second,) = torch.autograd.grad(total, pixels)
    step = torch.randn(pixels.shape, generator=derive(0, "step")) * 1e-2

    def energy(at: Tensor) -> float:
        made = network.gradient({}, at, labels[:1])
        return float(sum(g.double().square().sum() for g in made.values()))

    slope = (energy(x[:1] + step) - energy(x[:1] - step)) / 2
    assert slope == pytest.approx(float((second * step).sum()), rel=0.05)
