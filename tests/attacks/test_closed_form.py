"""Closed forms are exact where they apply, and say why where they do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkl.attacks.closed_form import ClosedForm, label_counts, penultimate_features
from fedkl.errors import AttackError
from fedkl.observation import Observation, ThreatModel, Training

SHAPE = (1, 6, 6)
THREAT = ThreatModel(name="none", words="")


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 20, bias=bias), nn.ReLU(), nn.Linear(20, 5, bias=bias)
    )


def observe(
    model: nn.Module, x: Tensor, y: Tensor, training: Training | None = None, **more: object
) -> Observation:
    """What torch's own autograd and SGD make of the images: the gradient, or before minus after."""
    facts = training or Training(batch_size=len(x))
    names, parameters = zip(*model.named_parameters(), strict=True)
    before = [p.detach().clone() for p in parameters]
    if facts.lr == 0:
        changes = torch.autograd.grad(cross_entropy(model(x), y), parameters)
    else:
        optimizer = torch.optim.SGD(
            parameters,
            lr=facts.lr,
            momentum=facts.momentum,
            nesterov=facts.nesterov,
            weight_decay=facts.weight_decay,
        )
        for _ in range(facts.local_steps):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        changes = tuple(b - p.detach() for b, p in zip(before, parameters, strict=True))
        with torch.no_grad():
            for p, b in zip(parameters, before, strict=True):
                p.copy_(b)
    return Observation(
        model=model,
        kind="update" if facts.lr else "gradient",
        changes=(dict(zip(names, changes, strict=True)),),
        image_shape=SHAPE,
        num_classes=5,
        training=facts,
        threat=THREAT,
        **more,  # type: ignore[arg-type]
    )


UPDATES = [
    Training(),
    Training(lr=0.1),
    Training(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    Training(lr=0.05, momentum=0.9, local_steps=4, repeats=True),
]


@pytest.mark.parametrize("training", UPDATES)
def test_image_and_label_of_one_example_are_exact(
    training: Training, generator: torch.Generator
) -> None:
    model = mlp()
    x = torch.rand(4, *SHAPE, generator=generator)
    y = torch.randint(5, (4,), generator=generator)
    observations = [observe(model, x[i : i + 1], y[i : i + 1], training) for i in range(4)]
    seen: list[int] = []
    found = ClosedForm().reconstruct(
        observations, generator=generator, progress=lambda done, *_: seen.append(done)
    )
    for i, reconstruction in enumerate(found):
        torch.testing.assert_close(reconstruction.images[0, 0], x[i], atol=1e-4, rtol=0)
        assert reconstruction.labels.tolist() == [[int(y[i])]]
        assert reconstruction.notes == ()
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("training", UPDATES[:3])
def test_penultimate_features_are_those_of_the_model(
    training: Training, generator: torch.Generator
) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(48, 7), nn.Tanh(), nn.Linear(7, 5)
    )
    x = torch.rand(1, *SHAPE, generator=generator)
    observation = observe(model, x, torch.tensor([3]), training)
    features = penultimate_features(observation)
    torch.testing.assert_close(features, model[:5](x).detach(), atol=1e-4, rtol=0)


def test_features_over_several_steps_lie_between_those_of_the_steps() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 1), nn.Linear(1, 5))
    x = torch.full((1, *SHAPE), 0.5)
    training = Training(lr=0.2, local_steps=3, repeats=True)
    steps = []
    moving = mlp_copy(model)
    optimizer = torch.optim.SGD(moving.parameters(), lr=0.2)
    for _ in range(3):
        steps.append(float(moving[:2](x).detach()))
        optimizer.zero_grad()
        cross_entropy(moving(x), torch.tensor([0])).backward()
        optimizer.step()
    found = float(penultimate_features(observe(model, x, torch.tensor([0]), training)))
    assert max(steps) - min(steps) > 0.01
    assert min(steps) <= found <= max(steps)


def mlp_copy(model: nn.Sequential) -> nn.Sequential:
    copy = nn.Sequential(nn.Flatten(), nn.Linear(36, 1), nn.Linear(1, 5))
    copy.load_state_dict(model.state_dict())
    return copy


def test_label_counts_are_exact_at_a_uniform_model(generator: torch.Generator) -> None:
    model = mlp()
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].bias.zero_()
    y = torch.tensor([0, 0, 0, 2, 4, 4, 1])
    observation = observe(model, torch.rand(7, *SHAPE, generator=generator), y)
    assert label_counts(observation).tolist() == [[3, 1, 1, 0, 2]]


def test_public_images_make_label_counts_right_at_a_biased_model(
    generator: torch.Generator,
) -> None:
    model = mlp()
    with torch.no_grad():
        model[3].bias.copy_(torch.tensor([3.0, 0.0, 0.0, 0.0, 2.0]))
    y = torch.tensor([1, 1, 2, 3, 3, 3, 3, 1])
    observation = observe(model, torch.rand(8, *SHAPE, generator=generator), y)
    public = torch.rand(50, *SHAPE, generator=generator)
    assert label_counts(observation, public).tolist() == [[0, 3, 1, 4, 0]]
    assert label_counts(observation).tolist() != [[0, 3, 1, 4, 0]]


def test_a_noisy_update_is_cut_to_pixels_and_says_so(generator: torch.Generator) -> None:
    observation = observe(mlp(), torch.rand(1, *SHAPE, generator=generator), torch.tensor([1]))
    observation.changes[0]["1.weight"].add_(torch.randn(20, 36, generator=generator))  # type: ignore[operator]
    (found,) = ClosedForm().reconstruct([observation], generator=generator)
    assert 0 <= float(found.images.min()) <= float(found.images.max()) <= 1
    assert "beyond [0, 1]" in found.notes[0]


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / 2


CANNOT = {
    "a Conv2d": nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(16, 5)),
    "has no bias": mlp(bias=False),
    "after a transformation": nn.Sequential(Halved(), nn.Linear(36, 5)),
    "zero everywhere": nn.Sequential(
        nn.Flatten(), nn.Linear(36, 4), nn.Hardtanh(1e9, 1e9 + 1), nn.Linear(4, 5)
    ),
}


@pytest.mark.parametrize("words", CANNOT)
def test_what_cannot_be_solved_says_why(words: str, generator: torch.Generator) -> None:
    observation = observe(CANNOT[words], torch.rand(1, *SHAPE), torch.tensor([1]))
    with pytest.raises(AttackError, match=words):
        ClosedForm().reconstruct([observation], generator=generator)


@pytest.mark.parametrize("words", CANNOT)
def test_every_victim_of_a_model_that_cannot_be_solved_says_so(
    words: str, generator: torch.Generator
) -> None:
    model = CANNOT[words]
    victims = [observe(model, torch.rand(1, *SHAPE), torch.tensor([i])) for i in range(3)]
    with pytest.raises(AttackError, match=words) as caught:
        ClosedForm().reconstruct(victims, generator=generator)
    assert list(caught.value.victims) == [0, 1, 2]


def test_batches_and_private_layers_are_errors(generator: torch.Generator) -> None:
    x, y = torch.rand(2, *SHAPE), torch.tensor([1, 2])
    attack, model = ClosedForm(), mlp()
    with pytest.raises(AttackError, match="label_counts"):
        attack.reconstruct([observe(model, x, y)], generator=generator)
    with pytest.raises(AttackError, match="updates of 2 images"):
        penultimate_features(observe(model, x, y))
    hidden = observe(model, x[:1], y[:1], secrets=("1.weight", "1.bias"))
    with pytest.raises(AttackError, match=r"1\.weight is private"):
        attack.reconstruct([hidden], generator=generator)
    headless = observe(model, x[:1], y[:1], secrets=("3.weight", "3.bias"))
    with pytest.raises(AttackError, match="no shared linear layer"):
        penultimate_features(headless)
    bare = observe(mlp(bias=False), x[:1], y[:1])
    for solve in (penultimate_features, label_counts):
        with pytest.raises(AttackError, match="has no bias"):
            solve(bare)
    with pytest.raises(AttackError, match="no observation"):
        attack.reconstruct([], generator=generator)
