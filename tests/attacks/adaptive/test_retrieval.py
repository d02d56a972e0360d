"""Retrieval: which of these images was it? With the key, without a lock, and by a shadow."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from adaptivehelp import observe
from shadowhelp import digits, public, trained_victim, victims
from torch import Tensor

from fedkl.attacks import Reconstruction
from fedkl.attacks.adaptive import Fishing, Retrieval, craft
from fedkl.attacks.adaptive.dual_encoder import DualEncoder
from fedkl.errors import AttackError, ConfigError
from fedkl.metrics import draw_decoys
from fedkl.observation import Observation, Training
from fedkl.rng import derive

COUNT = 60


def retrieval(**settings: Any) -> Retrieval:
    return Retrieval(*public(), **{"secret_epochs": 30, "sketch": 512, "epochs": 40, **settings})


def run(attack: Retrieval, observations: list[Observation]) -> list[Reconstruction]:
    return attack.reconstruct(observations, generator=derive(0, "attack"))


def rate(found: list[Reconstruction]) -> float:
    """How often the truth scores above 29 others of its class: chance is 3 %."""
    x, y = digits()
    own = torch.arange(len(found))
    decoys = draw_decoys(y[: len(found)], y, generator=derive(0, "decoys"), own=own, count=29)
    right = 0
    for i, one in enumerate(found):
        assert one.score is not None
        scores = one.score(0, torch.cat([x[i : i + 1], x[decoys[i]]]))
        assert scores.shape == (30,)
        right += bool(scores[0] > scores[1:].max())
    return right / len(found)


@cache
def holding_the_key() -> tuple[Reconstruction, ...]:
    return tuple(run(retrieval(), victims("key-shared", COUNT)))


@pytest.mark.slow
def test_key_holder_finds_most() -> None:
    found = [*holding_the_key()]
    assert rate(found) > 0.25
    assert "retrieval on gradient with the victim's secrets" in found[0].notes[0]
    assert "public images that fit best" in found[0].notes[-1]


@pytest.mark.slow
def test_pictures_are_public_images_of_the_class_that_resemble_the_victim() -> None:
    x, y = digits()
    images, labels = public()
    errors, guesses = [], []
    for i, one in enumerate(holding_the_key()):
        assert one.images.shape == (1, 1, 1, 8, 8)
        place = (images == one.images[0, 0]).flatten(1).all(dim=1).nonzero().flatten()
        assert y[i] in labels[place]
        assert one.labels.equal(y[i : i + 1, None])
        errors.append(float((one.images[0, 0] - x[i]).square().mean()))
        same = images[labels == y[i]]
        guesses.append(float((same - x[i]).square().mean()))
    assert sum(errors) < 0.85 * sum(guesses)  # than any image of the class


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"restandardize": "label", "shadows": 2}])
def test_shadow_with_secrets_of_its_own_beats_chance(settings: dict[str, Any]) -> None:
    """A lock per channel is no obstacle to whoever has public images."""
    found = run(retrieval(candidates=2, **settings), victims("adaptive", 80))
    assert rate(found) > 0.2


@pytest.mark.parametrize("how", [None, "global", "label", "transport"])
def test_same_generator_same_scores(how: str | None) -> None:
    seen = victims("adaptive", 20)
    candidates = digits()[0][:5]
    small = retrieval(secret_epochs=1, epochs=1, restandardize=how)
    made: list[Tensor] = []
    for seed in (1, 1, 2):
        one = small.reconstruct(seen, generator=derive(seed))[3]
        assert one.score is not None
        made.append(one.score(0, candidates))
    assert made[0].equal(made[1])
    assert not made[0].equal(made[2])
    assert bool((made[0].abs() <= 1 + 1e-5).all())  # a mean of cosines


def test_updates_of_one_victim_have_scores_of_their_own() -> None:
    seen = victims("key-shared", 3)
    pooled = replace(seen[0], changes=tuple(o.changes[0] for o in seen))
    candidates = digits()[0][:4]
    small = retrieval(epochs=1)
    together = run(small, [pooled])[0]
    apart = run(small, seen)
    assert together.images.shape == (3, 1, 1, 8, 8)
    assert together.score is not None
    for t, one in enumerate(apart):
        assert one.score is not None
        torch.testing.assert_close(together.score(t, candidates), one.score(0, candidates))


def test_progress_and_settings_are_told() -> None:
    told: list[tuple[int, int]] = []
    small = retrieval(epochs=2, shadows=2, secret_epochs=1)
    small.reconstruct(
        victims("key-shared", 1),
        generator=derive(0),
        progress=lambda done, total, loss: told.append((done, total)),
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "hidden" not in repr(small)
    assert "sketch=512" in repr(small)


def test_misfits_are_explained() -> None:
    seen = victims("key-shared", 1)
    batch = replace(seen[0], training=Training(batch_size=4))
    with pytest.raises(AttackError, match="batch 4"):
        run(retrieval(), [batch])
    with pytest.raises(ConfigError, match=r"restandardization.*transport"):
        retrieval(restandardize="often")


def test_a_class_without_public_images_is_answered_with_the_closest_of_all() -> None:
    x, y = public()
    label = int(digits()[1][0])
    keep = y != label
    attack = Retrieval(x[keep], y[keep], secret_epochs=1, epochs=1, sketch=64)
    found = run(attack, victims("key-shared", 1))
    assert bool((x[keep] == found[0].images[0, 0]).flatten(1).all(dim=1).any())


def test_fishing_keeps_the_score() -> None:
    """Of a batch with one image of the class, whose gradient alone gets through."""
    x, y = digits()
    victim = copy.deepcopy(trained_victim())  # other tests have the same one
    target = int(y[0])
    shared = {n: t for n, t in victim.public.state_dict().items() if "keylock" not in n}
    crafted = craft(shared, target, weight="5.weight", bias="5.bias")
    with torch.no_grad():
        for model in (victim.public, victim.locked):
            for name, tensor in model.state_dict().items():
                if name in crafted:
                    tensor.copy_(crafted[name])
    seen = observe(victim, "key-shared", [(x[:1], y[:1])], labels=False)
    small = Retrieval(*public(), secret_epochs=1, epochs=1, sketch=64)
    (found,) = Fishing(small, target).reconstruct([seen], generator=derive(0))
    assert found.score is not None
    assert found.score(0, x[:4]).shape == (4,)


def test_an_image_among_many_victims_candidates_is_embedded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = run(retrieval(epochs=1, sketch=64), victims("key-shared", 3))
    counts: list[int] = []
    embed = DualEncoder.embed

    def counted(self: DualEncoder, images: Tensor) -> Tensor:
        counts.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(DualEncoder, "embed", counted)
    candidates = digits()[0][:8]
    scores = []
    for one in found:
        assert one.score is not None
        scores.append(one.score(0, candidates))
        both = one.score(0, torch.cat([candidates[:1], candidates[:1]]))
        assert both[0] == both[1]  # to the last bit
    assert counts == [8]
    assert not scores[0].equal(scores[1])
