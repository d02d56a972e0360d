"""Made updates as clients send them: the same numbers, and derivatives through what stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attackhelp import CLASSES, images, observe, tiny
from torch.func import vmap
from torch.nn.functional import one_hot

from fedkl.attacks import ClosedForm, InvertingGradients
from fedkl.attacks.adaptive.shadow_client import ShadowClient
from fedkl.attacks.labels import infer_labels
from fedkl.attacks.network import Network
from fedkl.attacks.sending import as_sent, size_of
from fedkl.defenses import DefenseConfig, Sending, make_defense
from fedkl.errors import AttackError
from fedkl.federation import at_length
from fedkl.observation import Observation, Training
from fedkl.rng import derive

MODEL = tiny(norm=True)
X, Y = images(3, (1, 8, 8)), torch.tensor([0, 3, 1])
ALTERED = {
    "prune": {"prune_ratio": 0.9},
    "prune+noise": {"prune_ratio": 0.9, "clip": 0.5, "noise_multiplier": 0.0},
    "noise+prune": {"prune_ratio": 0.9, "clip": 0.5, "noise_multiplier": 0.0},
    "noise": {"clip": 0.5, "noise_multiplier": 0.0},
}


def altered(name: str, length: float | None = None) -> list[Observation]:
    """One victim per image, whose update went through the defense's own code."""
    defense = make_defense(DefenseConfig(name=name, **ALTERED[name]))
    training = Training(length=length, **defense.known)
    found = []
    for one in observe(MODEL, X, Y):
        (change,) = one.changes
        if length is not None:
            change = at_length(change, length)
        sent = defense.share(change, Sending(None, [*change], derive(0, "noise")))
        found.append(replace(one, changes=(sent,), training=training))
    return found


@pytest.mark.parametrize("length", [None, 0.7], ids=["as it is", "at one length"])
@pytest.mark.parametrize("name", ALTERED)
def test_the_made_update_of_the_true_image_is_what_was_sent(
    name: str, length: float | None
) -> None:
    victims = altered(name, length)
    network = Network.of(victims)
    labels = one_hot(Y, CLASSES).float()
    together = vmap(lambda x, y: network.change({}, x[None], y[None]))(X, labels)
    for i, victim in enumerate(victims):
        made = network.change({}, X[i : i + 1], labels[i : i + 1])
        for key, value in victim.changes[0].items():
            torch.testing.assert_close(made[key], value, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(together[key][i], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ALTERED)
def test_a_shadow_client_sends_the_same(name: str) -> None:
    victims = altered(name)
    client = ShadowClient(Network.of(victims), {}, CLASSES)
    (made,) = client.gradients(X, Y)
    for i, victim in enumerate(victims):
        for key, value in victim.changes[0].items():
            torch.testing.assert_close(made[key][i], value, rtol=1e-4, atol=1e-6)


def test_derivatives_go_through_what_stays_and_through_it_alone() -> None:
    change = {"w": torch.tensor([3.0, -0.5, 4.0, 0.1], requires_grad=True)}
    made = as_sent(change, Training(prune_ratio=0.5))
    (found,) = torch.autograd.grad(made["w"].square().sum(), change["w"])
    assert found.tolist() == [6.0, 0.0, 8.0, 0.0]
    made = as_sent(change, Training(clip=1.0))
    assert float(size_of(made).detach()) == pytest.approx(1.0)
    (flat,) = torch.autograd.grad(size_of(made), change["w"])
    torch.testing.assert_close(flat, torch.zeros(4), rtol=0, atol=1e-6)


def test_a_made_update_of_zeros_is_no_error() -> None:
    training = Training(length=1.0, prune_ratio=0.5, clip=0.5)
    assert as_sent({"w": torch.zeros(4)}, training)["w"].tolist() == [0.0] * 4


@pytest.mark.parametrize("name", ALTERED)
def test_a_search_gets_nearer_to_the_image(name: str) -> None:
    victims = altered(name)
    far = InvertingGradients(iterations=1, restarts=1)
    near = InvertingGradients(iterations=150, restarts=1, tv=0.0)
    one, two = (a.reconstruct(victims, generator=derive(0, "attack"))[0].loss for a in (far, near))
    assert two < one / 2


@pytest.mark.parametrize("name", ALTERED)
def test_labels_are_read_of_one_image_and_not_of_a_batch(name: str) -> None:
    victims = altered(name)
    network = Network.of(victims)
    assert [int(infer_labels(victim, network)) for victim in victims] == Y.tolist()
    batch = replace(victims[0], training=replace(victims[0].training, batch_size=2))
    words = r"(pruned by 0\.9|clipped to 0\.5)"
    with pytest.raises(AttackError, match=rf"this update was {words}.*; grant the labels"):
        infer_labels(batch, network)


def test_closed_forms_say_that_their_equations_do_not_hold() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, CLASSES))
    (one,) = observe(model, X[:1], Y[:1])
    pruned = replace(one, training=Training(prune_ratio=0.5, noise=0.01))
    generator = derive(0, "attack")
    assert ClosedForm().reconstruct([one], generator=generator)[0].notes == ()
    notes = ClosedForm().reconstruct([pruned], generator=generator)[0].notes
    assert any("pruned by 0.5 and noised by 0.01" in note for note in notes)


def test_the_gradient_behind_a_pruned_update_is_zero_where_nothing_was_sent() -> None:
    training = Training(lr=0.5, weight_decay=0.1, prune_ratio=0.5)
    found = training.gradient(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))
    assert found.tolist() == pytest.approx([1.9, 0.0])
