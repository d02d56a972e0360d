"""A server that fishes for one class out of a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adaptivehelp import gradients, images, lenet
from torch import Tensor, nn

from fedkl import at_length
from fedkl.attacks import InvertingGradients
from fedkl.attacks.adaptive import Fishing, catch, craft
from fedkl.attacks.adaptive.crafting import NOTE
from fedkl.data import load
from fedkl.errors import AttackError, ConfigError
from fedkl.metrics import best_matching, ssim
from fedkl.observation import THREATS, Observation, Training
from fedkl.rng import derive

HEAD = {"weight": "fc.weight", "bias": "fc.bias"}


def distinct(count: int = 8) -> tuple[Tensor, Tensor]:
    """The first test image of each of ``count`` classes."""
    test = load("fashion-mnist", channels=1).test
    rows = torch.stack([(test.labels == c).nonzero()[0, 0] for c in range(count)])
    return test.batch(rows)


def sent(model: nn.Module, x: Tensor, y: Tensor) -> Observation:
    return Observation(
        model=model,
        kind="gradient",
        changes=(gradients(model, x, y),),
        image_shape=(1, 32, 32),
        num_classes=10,
        training=Training(batch_size=len(x)),
        threat=THREATS["crafting"],
        labels=y[None],
    )


def crafted(target: int) -> nn.Module:
    model = lenet()
    model.load_state_dict(craft(model.state_dict(), target, **HEAD))
    return model


def test_batch_leaves_the_targets_gradient_alone() -> None:
    x, y = distinct()
    model = crafted(3)
    batch = replace(sent(model, x, y), statistics=({"norm.running_mean": torch.zeros(1)},))
    caught = catch(batch, 3)
    assert caught.statistics == ()  # they were those of all images
    alone = gradients(model, x[3:4], y[3:4])
    for name, gradient in caught.changes[0].items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-3, atol=1e-6, msg=name)
    assert caught.training.images == 1
    assert caught.labels is not None
    assert caught.labels.tolist() == [[3]]


def test_an_update_is_caught_as_well() -> None:
    x, y = distinct(4)
    model = crafted(2)
    gradient = gradients(model, x, y)
    training = Training(batch_size=4, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    update = {n: 0.1 * 1.9 * (g + 1e-3 * weights[n]) for n, g in gradient.items()}
    seen = replace(sent(model, x, y), kind="update", training=training, changes=(update,))
    alone = gradients(model, x[2:3], y[2:3])
    caught = catch(seen, 2)
    assert caught.kind == "gradient"
    for name, found in caught.changes[0].items():
        torch.testing.assert_close(found, alone[name], rtol=1e-2, atol=1e-5, msg=name)


@pytest.mark.slow
def test_the_image_comes_out_of_a_batch_of_eight() -> None:
    x, y = distinct()
    attack = InvertingGradients(iterations=250)
    fished = Fishing(attack, 3)
    (found,) = fished.reconstruct([sent(crafted(3), x, y)], generator=derive(0))
    (honest,) = attack.reconstruct([sent(lenet(), x, y)], generator=derive(0))
    assert found.images.shape == (1, 1, 1, 32, 32)
    assert found.labels.tolist() == [[3]]
    assert NOTE in found.notes[-1]
    caught = float(ssim(found.images[0], x[3:4]))
    order = best_matching(honest.images[0], x)
    mixed = float(ssim(honest.images[0][order], x)[3])
    assert caught > 0.35
    assert caught > mixed + 0.2
    assert fished.name == "inverting-gradients+fishing"


def test_a_batch_that_was_sent_at_one_length_is_caught_as_well() -> None:
    x, y = distinct()
    model = crafted(3)
    batch = sent(model, x, y)
    training = replace(batch.training, length=0.1)
    seen = replace(batch, changes=(at_length(batch.changes[0], 0.1),), training=training)
    caught = catch(seen, 3)
    for name, gradient in catch(batch, 3).changes[0].items():
        torch.testing.assert_close(caught.changes[0][name], gradient, rtol=1e-3, atol=1e-6)
    assert caught.training.length is None
    with pytest.raises(AttackError, match="no image of class 9"):
        catch(replace(seen, model=crafted(9)), 9)


def test_honest_state_stays_as_it_was() -> None:
    state = lenet().state_dict()
    before = {n: t.clone() for n, t in state.items()}
    made = craft(state, 0, **HEAD)
    assert all(state[n].equal(before[n]) for n in state)
    assert {n for n in made if not made[n].equal(state[n])} == {"fc.weight", "fc.bias"}
    assert made["fc.weight"][0].equal(state["fc.weight"][0])


def test_misfits_are_explained() -> None:
    state = lenet().state_dict()
    with pytest.raises(ConfigError, match=r"'head.weight' is no tensor"):
        craft(state, 0, weight="head.weight", bias="fc.bias")
    with pytest.raises(ConfigError, match="target 10"):
        craft(state, 10, **HEAD)
    with pytest.raises(ConfigError, match="margin 0"):
        craft(state, 1, margin=0, **HEAD)
    x, y = images(2)
    other = next(c for c in range(10) if c not in y.tolist())
    with pytest.raises(AttackError, match=f"no image of class {other}"):
        catch(sent(crafted(other), x, y), other)
    seen = sent(crafted(int(y[0])), x, y)
    steps = replace(seen, kind="update", training=Training(batch_size=2, local_steps=3, lr=0.1))
    with pytest.raises(AttackError, match="3 steps"):
        catch(steps, int(y[0]))


def test_one_image_is_fished_out_of_an_aggregate() -> None:
    """Two clients with two images each: the server sees the mean of their gradients."""
    x, y = distinct(4)
    model = crafted(2)
    seen = replace(sent(model, x, y), training=Training(batch_size=2, clients=2))
    caught = catch(seen, 2)
    assert caught.training.images == caught.training.clients == 1
    for name, gradient in gradients(model, x[2:3], y[2:3]).items():
        torch.testing.assert_close(caught.changes[0][name], gradient, rtol=1e-3, atol=1e-6)
