"""Replay of updates that several images or steps are behind."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from adaptivehelp import gradients, observe
from shadowhelp import digits, network_of, open_victims, public, trained_victim
from torch import nn

from fedkl import at_length
from fedkl.attacks import Reconstruction
from fedkl.attacks.adaptive import Replay
from fedkl.attacks.adaptive.sketch import gradients_of
from fedkl.errors import AttackError
from fedkl.metrics import draw_decoys
from fedkl.observation import Observation, Training
from fedkl.rng import derive

VICTIMS, BATCH = 12, 6


def replay(**settings: Any) -> Replay:
    return Replay(*public(), **{"secret_epochs": 30, "sketch": 1024, **settings})


def run(attack: Replay, observations: list[Observation]) -> list[Reconstruction]:
    return attack.reconstruct(observations, generator=derive(0, "attack"))


def rows(victim: int) -> slice:
    return slice(victim * BATCH, (victim + 1) * BATCH)


@cache
def locked(threat: str, updates: int = 1) -> list[Observation]:
    """Victims of a channel lock, each with ``updates`` of six images; public are 100 to 700."""
    x, y = digits()
    size = updates * VICTIMS // 2 if updates > 1 else VICTIMS
    batches = [(x[rows(i)], y[rows(i)]) for i in range(size)]
    return [
        observe(trained_victim(), threat, batches[i : i + updates]) for i in range(0, size, updates)
    ]


def unlocked(model: nn.Module, batch: int = BATCH) -> list[Observation]:
    """The same images without a lock, the gradients those of ``model``."""
    x, y = digits()
    return [
        replace(
            open_victims(1)[0],
            changes=(gradients(model, x[i : i + batch], y[i : i + batch]),),
            training=Training(batch_size=batch),
        )
        for i in range(0, VICTIMS * BATCH, batch)
    ]


def rate(found: list[Reconstruction]) -> float:
    """How often the truth scores above 29 others of its class: chance is 3 %."""
    x, y = digits()
    batch = found[0].images.shape[1]
    count = sum(one.images.shape[0] * batch for one in found)
    own = torch.arange(count).view(-1, batch).repeat_interleave(batch, dim=0)
    decoys = draw_decoys(y[:count], y, generator=derive(0, "decoys"), own=own, count=29)
    given = [torch.cat([x[i : i + 1], x[decoys[i]]]) for i in range(count)]
    assert found[0].together is not None
    scores = found[0].together(given, y[:count])
    assert [s.shape for s in scores] == [(30,)] * count
    return sum(bool(s[0] > s[1:].max()) for s in scores) / count


def test_images_of_a_batch_are_found_without_a_lock_and_with_the_key() -> None:
    assert rate(run(replay(), unlocked(network_of("model")))) > 0.95
    assert rate(run(replay(), locked("key-shared"))) > 0.3  # norms make the images of a batch one
    assert rate(run(replay(), unlocked(network_of("model"), 36))) > 0.95


@pytest.mark.parametrize("length", [0.01, 100.0])
def test_images_of_a_batch_are_found_at_whatever_length_it_was_sent(length: float) -> None:
    assert rate(run(replay(), at_one(length, unlocked(network_of("model"))))) > 0.95
    assert rate(run(replay(), at_one(length, locked("key-shared")))) > 0.3


def at_one(length: float, observations: list[Observation]) -> list[Observation]:
    """The same, labels granted, with every update at ``length``."""
    return [
        replace(
            one,
            changes=tuple(at_length(change, length) for change in one.changes),
            training=replace(one.training, length=length),
        )
        for one in observations
    ]


def test_of_another_model_it_finds_what_a_guesser_finds() -> None:
    """So that the rates above are the gradients' doing."""
    assert rate(run(replay(), unlocked(network_of("other")))) < 0.2


def test_every_update_of_a_victim_is_asked_about_its_own_images() -> None:
    one_each, three = run(replay(), locked("key-shared")), run(replay(), locked("key-shared", 3))
    assert len(one_each) == VICTIMS
    assert len(three) == VICTIMS // 2
    assert three[0].images.shape == (3, BATCH, 1, 8, 8)
    assert three[0].labels.shape == (3, BATCH)
    assert rate(three) > 0.3


def test_several_steps_are_taken_for_the_sum_of_their_gradients() -> None:
    x, y = digits()
    training = Training(batch_size=2, local_steps=3, lr=0.01, momentum=0.5)
    seen = []
    for i in range(VICTIMS):
        model = network_of("model")
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
        for step in range(3):
            mine = slice(i * BATCH + 2 * step, i * BATCH + 2 * step + 2)
            gradients(model, x[mine], y[mine])
            optimizer.step()
        change = {n: before[n] - p.detach() for n, p in model.named_parameters()}
        whole = replace(open_victims(1)[0], kind="update", changes=(change,), training=training)
        seen.append(whole)
    assert rate(run(replay(), seen)) > 0.8


def test_the_public_images_that_fit_best_are_shown() -> None:
    x, y = digits()
    images, labels = torch.cat([public()[0], x[:BATCH]]), torch.cat([public()[1], y[:BATCH]])
    (one,) = run(Replay(images, labels, sketch=1024), unlocked(network_of("model"))[:1])
    shown = {i for i in range(BATCH) if bool((one.images[0] == x[i]).flatten(1).all(dim=1).any())}
    assert len(shown) >= BATCH - 2
    assert "taken for the sum" in one.notes[0]
    places = [(images == image).flatten(1).all(dim=1).nonzero()[0, 0] for image in one.images[0]]
    assert one.labels[0].equal(labels[torch.stack(places)])


def test_fewer_public_images_than_the_update_holds_are_shown_more_than_once() -> None:
    few = Replay(*(part[:4] for part in (public()[0], torch.tensor([0, 0, 1, 1]))), sketch=1024)
    (one,) = run(few, locked("key-shared")[:1])
    assert one.images.shape == (1, BATCH, 1, 8, 8)


@pytest.mark.parametrize("first", [0, 1])
def test_the_shadow_closest_to_the_victims_is_kept(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a shadow with the victim's own secrets and one with others."""
    from fedkl.attacks.adaptive import shadow

    held = locked("key-shared")[0].known
    wrong = {name: -value for name, value in held.items()}
    offered = [wrong, held][:: -1 if first else 1]
    monkeypatch.setattr(shadow, "train_secrets", lambda *_, **__: offered.pop())
    seen = locked("adaptive")
    both = rate(run(replay(candidates=2), seen))
    assert offered == []
    assert both == rate(run(replay(), locked("key-shared")))


@pytest.mark.parametrize(
    ("settings", "training", "message"),
    [
        ({"restandardize": "matched"}, Training(batch_size=BATCH), "Use 'replay'"),
        ({"restandardize": "global"}, Training(local_steps=2), "Use 'replay'"),
        ({}, Training(batch_size=2, clients=3), "3 clients"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    settings: dict[str, Any], training: Training, message: str
) -> None:
    seen = replace(locked("adaptive")[0], training=training)
    with pytest.raises(AttackError, match=message):
        run(replay(**settings), [seen])


def test_clients_without_secrets_may_be_several() -> None:
    training = Training(batch_size=2, clients=3)
    seen = [replace(one, training=training) for one in unlocked(network_of("model"))]
    assert rate(run(replay(), seen)) > 0.95


def test_candidates_may_be_of_another_precision() -> None:
    x, y = digits()
    (one,) = run(replay(), unlocked(network_of("model"))[:1])
    assert one.together is not None
    given = [x[i : i + 3] for i in range(BATCH)]
    found = one.together([some.double() for some in given], y[:BATCH])
    torch.testing.assert_close(found, one.together(given, y[:BATCH]))


def test_a_rate_of_zero_is_refused_in_words_that_help() -> None:
    seen = [replace(one, kind="update") for one in unlocked(network_of("model"))]
    with pytest.raises(AttackError, match="learning rate"):
        run(replay(), seen)


def test_one_huge_update_costs_only_itself() -> None:
    seen = unlocked(network_of("model"))
    huge = {name: 1e25 * value for name, value in seen[-1].changes[0].items()}
    with pytest.raises(AttackError, match="too large") as caught:  # no match is no miss
        run(replay(), [*seen[:-1], replace(seen[-1], changes=(huge,))])
    assert list(caught.value.victims) == [len(seen) - 1]
    assert rate(run(replay(), seen[:-1])) > 0.85


def test_gradients_are_held_one_update_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large networks all of them at once would not fit into memory a second time."""
    from fedkl.attacks.adaptive import replay as module

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counted(*args: Any) -> dict[str, torch.Tensor]:
        nonlocal most
        made = gradients_of(*args)
        alive.append(weakref.ref(next(iter(made.values()))))
        most = max(most, sum(one() is not None for one in alive))
        return made

    monkeypatch.setattr(module, "gradients_of", counted)
    run(replay(), unlocked(network_of("model")))
    assert len(alive) >= VICTIMS
    assert most <= 2


def test_public_images_of_another_shape_are_refused_here_too() -> None:
    x, y = public()
    with pytest.raises(AttackError, match="public images of"):
        run(Replay(x[..., :6], y), locked("adaptive")[:1])
