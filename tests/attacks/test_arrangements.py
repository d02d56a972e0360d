"""Whose label is whose in an update of several clients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attackhelp import gradient_of, images, observe, tiny
from torch import Tensor

from fedkl.attacks import InvertingGradients
from fedkl.attacks.arrangements import MOST, arrangements
from fedkl.attacks.counting import Counted
from fedkl.attacks.labels import infer_labels
from fedkl.attacks.network import Network
from fedkl.metrics import ssim_aligned
from fedkl.observation import Observation, Training
from fedkl.rng import derive

SECRETS = ("1.weight", "1.bias")


def aggregate(x: Tensor, y: Tensor, clients: int, *, known: bool) -> Observation:
    """The mean gradient of clients, each with γ and β of its own and its share of the images."""
    model, parts, held = tiny(norm=True), [], []
    for client, (mine, labels) in enumerate(zip(x.chunk(clients), y.chunk(clients), strict=True)):
        own = {
            name: torch.randn(6, generator=derive(client, name)) + (name == "1.weight")
            for name in SECRETS
        }
        with torch.no_grad():
            for name, value in own.items():
                model.get_parameter(name).copy_(value)
        parts.append(gradient_of(model, mine, labels))
        held.append(own)
    change = {n: torch.stack([p[n] for p in parts]).mean(dim=0) for n in parts[0]}
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        model[1].bias.zero_()
    return replace(
        observe(model, x[:1], y[:1])[0],
        changes=({n: g for n, g in change.items() if n not in SECRETS},),
        training=Training(batch_size=len(y) // clients, clients=clients),
        secrets=SECRETS,
        known={n: torch.stack([one[n] for one in held]) for n in SECRETS} if known else {},
    )


def ways(labels: list[int], clients: int, *, known: bool) -> list[list[int]]:
    y = torch.tensor(labels)
    observation = aggregate(images(len(y), (1, 8, 8)), y, clients, known=known)
    orders = arrangements(y[None], observation, Network(observation), derive(0, "a"))
    assert orders[0].tolist() == [list(range(len(y)))]
    assert all(sorted(o[0].tolist()) == list(range(len(y))) for o in orders)
    return [y[o[0]].tolist() for o in orders]


def test_orders_are_those_that_make_a_difference() -> None:
    assert ways([1, 3], 2, known=True) == [[1, 3], [3, 1]]
    assert ways([3, 3], 2, known=True) == [[3, 3]]
    # Unknown secrets are searched for each client: whose they are called is all the same.
    assert ways([1, 3], 2, known=False) == [[1, 3]]
    assert sorted(map(sorted, ways([0, 1, 2], 3, known=True))) == [[0, 1, 2]] * 6
    assert ways([0, 0, 1, 1], 2, known=True) == [[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0]]
    assert ways([0, 0, 1, 1], 2, known=False) == [[0, 0, 1, 1], [0, 1, 0, 1]]
    many = ways([0, 1, 2, 3, 0, 1, 2, 3], 4, known=True)
    assert len(many) == MOST
    assert len({tuple(tuple(sorted(one[i : i + 2])) for i in (0, 2, 4, 6)) for one in many}) == MOST


@pytest.mark.parametrize("granted", [False, True])
def test_key_holder_finds_whose_label_is_whose(granted: bool) -> None:
    """The classifier tells that a 1 and a 3 were there; it was the first client that had the 3."""
    x, y = images(2, (1, 8, 8)), torch.tensor([3, 1])
    seen = aggregate(x, y, 2, known=True)
    assert infer_labels(seen, Network(seen)).tolist() == [[1, 3]]
    if granted:
        seen = replace(seen, labels=torch.tensor([[1, 3]]))
    attack = InvertingGradients(iterations=400, signed=False, tv=0.0)
    (found,) = attack.reconstruct([seen], generator=derive(0, "a"))
    assert found.labels.tolist() == [[3, 1]]
    assert float(ssim_aligned(found.images[0], x).min()) > 0.9
    assert "in 2 ways" in found.notes[0]


def test_every_guess_goes_with_its_label() -> None:
    x, y = images(2, (1, 8, 8)), torch.tensor([3, 1])
    seen = aggregate(x, y, 2, known=True)
    attack = InvertingGradients(iterations=1, signed=False, tv=0.0, lr=1e-9)
    guess = x.flip(0)[None]  # of the labels in ascending order
    (found,) = attack.reconstruct([seen], generator=derive(0, "a"), guesses=[guess])
    assert found.labels.tolist() == [[3, 1]]
    torch.testing.assert_close(found.images, x[None], atol=1e-6, rtol=0)
    assert found.loss < 1e-6


def stepwise(x: Tensor, y: Tensor, batch: int, lr: float = 0.3) -> Observation:
    """The update of plain SGD steps over ``x``, ``batch`` images each."""
    model = tiny(norm=True)
    training = Training(batch_size=batch, local_steps=len(y) // batch, lr=lr)
    seen = replace(observe(model, x[:1], y[:1])[0], kind="update", training=training)
    network = Network(seen)
    change = network.change({}, x, torch.nn.functional.one_hot(y, 4).float())
    return replace(seen, changes=(change,))


def step_ways(labels: list[int], training: Training, *, known: bool) -> list[list[int]]:
    y = torch.tensor(labels)
    seen = aggregate(images(len(y), (1, 8, 8)), y, training.clients, known=known)
    seen = replace(seen, kind="update", training=training)
    orders = arrangements(y[None], seen, Network(seen), derive(0, "a"))
    assert orders[0].tolist() == [list(range(len(y)))]
    assert all(sorted(o[0].tolist()) == list(range(len(y))) for o in orders)
    return [y[o[0]].tolist() for o in orders]


def test_labels_are_dealt_to_steps_and_to_steps_of_clients() -> None:
    two = Training(batch_size=2, local_steps=2, lr=0.1)
    assert sorted(step_ways([0, 1, 2, 3], two, known=False)) == [
        [0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 1, 2], [1, 2, 0, 3], [1, 3, 0, 2], [2, 3, 0, 1]
    ]  # fmt: skip
    assert (
        len(step_ways([0, 1, 2, 3], replace(two, batch_size=1, local_steps=4), known=False)) == 24
    )
    assert step_ways([0, 1], replace(two, batch_size=1, repeats=True, clients=2), known=False) == [
        [0, 1]
    ]
    # Two clients of two steps: who is who matters only where their secrets are known.
    both = Training(batch_size=1, local_steps=2, lr=0.1, clients=2)
    assert len(step_ways([0, 1, 2, 3], both, known=True)) == 24
    unknown = step_ways([0, 1, 2, 3], both, known=False)
    assert len(unknown) == 12
    assert len({tuple(sorted([tuple(w[:2]), tuple(w[2:])])) for w in unknown}) == 12
    assert (
        len(step_ways([0, 1, 2, 3, 0, 1, 2, 3], replace(two, local_steps=4), known=False)) == MOST
    )


def test_search_finds_which_label_was_at_which_step() -> None:
    """The classifier tells that a 1 and a 3 were there; it was the first step that saw the 3."""
    x, y = images(2, (1, 8, 8)), torch.tensor([3, 1])
    seen = stepwise(x, y, 1)
    assert infer_labels(seen, Network(seen)).tolist() == [[1, 3]]
    attack = InvertingGradients(iterations=1000, signed=False, tv=0.0)
    (found,) = attack.reconstruct([seen], generator=derive(0, "a"))
    assert found.labels.tolist() == [[3, 1]]
    assert float(ssim_aligned(found.images[0], x).min()) > 0.9  # in ascending order below 0.4
    assert "to steps in 2 ways" in found.notes[0]


def test_labels_that_do_not_tell_their_steps_are_dealt_out() -> None:
    """Those counted with public images, and those granted without their order."""
    seen = stepwise(images(2, (1, 8, 8)), torch.tensor([3, 1]), 1)
    attack = InvertingGradients(iterations=1, signed=False)
    granted = replace(seen, labels=torch.tensor([[1, 3]]), ordered=False)
    for one, how in ((seen, Counted(attack, images(20, (1, 8, 8), seed=1))), (granted, attack)):
        (found,) = how.reconstruct([one], generator=derive(0, "a"))
        assert "to steps in 2 ways" in found.notes[0]


def test_labels_granted_in_the_order_of_steps_stay() -> None:
    x, y = images(2, (1, 8, 8)), torch.tensor([3, 1])
    seen = replace(stepwise(x, y, 1), labels=y[None])
    attack = InvertingGradients(iterations=1, signed=False)
    (found,) = attack.reconstruct([seen], generator=derive(0, "a"))
    assert found.labels.tolist() == [[3, 1]]
    assert not any("ways" in note for note in found.notes)
