"""The relations attack on updates: with the key, across turned coordinates, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from shadowhelp import digits, open_victims, public, victims
from torch import Tensor

from fedkl import at_length
from fedkl.attacks import Reconstruction
from fedkl.attacks.adaptive import ReplayRelations
from fedkl.attacks.adaptive.sketch import Sketch
from fedkl.errors import AttackError, ConfigError
from fedkl.metrics import draw_decoys
from fedkl.observation import Observation
from fedkl.rng import derive


def attack(kind: type[ReplayRelations] = ReplayRelations, **settings: Any) -> ReplayRelations:
    return kind(*public(), **{"secret_epochs": 10, "sketch": 512, "shadows": 2, **settings})


def run(one: ReplayRelations, observations: list[Observation]) -> list[Reconstruction]:
    return one.reconstruct(observations, generator=derive(0, "attack"))


def candidates(count: int) -> list[Tensor]:
    """The truth and 29 others of its class: chance is 3 %."""
    x, y = digits()
    own = torch.arange(count)
    decoys = draw_decoys(y[:count], y, generator=derive(0, "decoys"), own=own, count=29)
    return [torch.cat([x[i : i + 1], x[decoys[i]]]) for i in range(count)]


def rate(found: list[Reconstruction]) -> float:
    assert found[0].together is not None
    scores = found[0].together(candidates(len(found)), digits()[1][: len(found)])
    assert [s.shape for s in scores] == [(30,)] * len(found)
    return sum(bool(s[0] > s[1:].max()) for s in scores) / len(found)


def test_who_holds_the_key_finds_everyone_by_the_size_alone_or_nearly() -> None:
    found = run(attack(), victims("key-shared", 30))
    assert rate(found) == 1
    right = 0
    for one, given in zip(found, candidates(30), strict=True):
        assert one.score is not None
        scores = one.score(0, given)
        right += bool(scores[0] > scores[1:].max())
    assert right / 30 > 0.8
    assert "replay-relations on gradient with the victim's secrets" in found[0].notes[0]


def test_without_a_lock_there_is_nothing_to_train_and_everyone_is_found() -> None:
    assert rate(run(attack(), open_victims(20))) == 1


class Turned(ReplayRelations):
    """Victims whose gradients are the attacker's own but for a rotation."""

    def _given_away(self, *args: Any) -> tuple[Tensor, Sketch | None]:
        seen, sketch = super()._given_away(*args)
        size = seen.shape[1] - 1
        turn = torch.linalg.qr(torch.randn(size, size, generator=derive(0, "turn")))[0]
        return torch.cat([seen[:, :1], seen[:, 1:] @ turn], dim=1), sketch


def test_relations_need_no_coordinates_of_the_victims() -> None:
    assert rate(run(attack(Turned), victims("key-shared", 32))) == 1


def test_of_updates_of_one_length_the_size_is_not_asked() -> None:
    """Whatever it is: the cosines are the same, and decide alone."""
    seen = victims("key-shared", 20)
    training = replace(seen[0].training, length=1.0)
    changed = [
        replace(o, training=training, changes=tuple(at_length(c, i + 1.0) for c in o.changes))
        for i, o in enumerate(seen)
    ]
    lost, found = (run(attack(), given) for given in (changed, seen))
    assert rate(lost) > 0.7
    for one, given in zip(lost, candidates(20), strict=True):
        assert one.score is not None
        assert not one.score(0, given).any()
    assert found[0].score is not None
    assert bool(found[0].score(0, candidates(20)[0]).any())


def test_groups_are_asked_about_apart() -> None:
    seen = victims("adaptive", 20)
    whole = run(attack(group=10), seen)
    assert whole[0].together is not None
    scores = whole[0].together(candidates(20), digits()[1][:20])
    for start in (0, 10):
        part = run(attack(group=10), seen[start : start + 10])
        assert part[0].together is not None
        mine = part[0].together(candidates(20)[start : start + 10], digits()[1][start : start + 10])
        for one, want in zip(scores[start : start + 10], mine, strict=True):
            torch.testing.assert_close(one, want, rtol=1e-3, atol=1e-3)


def test_a_public_image_of_the_class_is_shown() -> None:
    for i, one in enumerate(run(attack(), victims("adaptive", 8))):
        place = (public()[0] == one.images[0, 0]).flatten(1).all(dim=1).nonzero().flatten()
        assert digits()[1][i] in public()[1][place]


def test_what_it_cannot_do_it_says() -> None:
    with pytest.raises(ConfigError, match="groups of 0"):
        attack(group=0)
    with pytest.raises(ConfigError, match="1 shadow;"):
        attack(shadows=1)
    seen = victims("adaptive", 2)
    batch = replace(seen[0], training=replace(seen[0].training, batch_size=2))
    with pytest.raises(AttackError, match="one image and one step"):
        run(attack(), [batch])
    broken = tuple({n: t * float("nan") for n, t in c.items()} for c in seen[0].changes)
    with pytest.raises(AttackError, match="NaN"):
        run(attack(), [replace(seen[0], changes=broken), seen[1]])
