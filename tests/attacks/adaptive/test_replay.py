"""Replay: gradients of the images in question, made by a client of the attacker's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from shadowhelp import digits, open_victims, public, victims
from torch import Tensor

from fedkl.attacks import Reconstruction
from fedkl.attacks.adaptive import Replay
from fedkl.attacks.adaptive.matched import Matched
from fedkl.attacks.adaptive.replay import Replayed
from fedkl.attacks.adaptive.shadow_client import ShadowClient
from fedkl.attacks.adaptive.sketch import Sketch
from fedkl.errors import AttackError, ConfigError
from fedkl.metrics import draw_decoys
from fedkl.observation import Observation
from fedkl.rng import derive


def replay(**settings: Any) -> Replay:
    return Replay(*public(), **{"secret_epochs": 30, "sketch": 512, **settings})


def run(attack: Replay, observations: list[Observation]) -> list[Reconstruction]:
    return attack.reconstruct(observations, generator=derive(0, "attack"))


def rate(found: list[Reconstruction], given: slice = slice(None)) -> float:
    """How often the truth scores above 29 others of its class: chance is 3 %."""
    x, y = digits()
    own = torch.arange(len(found))
    decoys = draw_decoys(y[: len(found)], y, generator=derive(0, "decoys"), own=own, count=29)
    right = []
    for i, one in enumerate(found):
        assert one.score is not None
        scores = one.score(0, torch.cat([x[i : i + 1], x[decoys[i]]]))
        assert scores.shape == (30,)
        right.append(bool(scores[0] > scores[1:].max()))
    return sum(right[given]) / len(right[given])


def test_who_holds_the_key_finds_everyone() -> None:
    found = run(replay(), victims("key-shared", 30))
    assert rate(found) == 1
    assert "replay on gradient with the victim's secrets" in found[0].notes[0]
    assert "public images that fit best" in found[0].notes[-1]
    x, y = digits()
    candidates = x[(y == y[0]).nonzero().flatten()[:5]]
    assert found[0].score is not None
    scores = found[0].score(0, candidates)
    assert float(scores[0]) == pytest.approx(1, abs=1e-3)  # the very same gradient
    assert float(scores[1:].max()) < 0.9


def test_a_single_update_at_a_rate_of_zero_is_refused() -> None:
    """Its gradient is the change divided by the rate: all scores were NaN."""
    seen = [replace(one, kind="update") for one in open_victims(2)]
    with pytest.raises(AttackError, match="learning rate of 0") as caught:
        run(replay(), seen)
    assert list(caught.value.victims) == [0, 1]


def test_a_public_image_of_the_class_is_shown_and_the_victims_own_if_it_is_one() -> None:
    x, y = digits()
    images, labels = torch.cat([public()[0], x[:10]]), torch.cat([public()[1], y[:10]])
    attack = Replay(images, labels, sketch=512)
    for i, one in enumerate(run(attack, victims("key-shared", 20))):
        place = (images == one.images[0, 0]).flatten(1).all(dim=1).nonzero().flatten()
        assert y[i] in labels[place]
        assert one.labels.equal(y[i : i + 1, None])
        if i < 10:
            assert one.images[0, 0].equal(x[i])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"restandardize": "label", "shadows": 2}])
def test_a_lock_per_channel_is_no_obstacle_to_a_shadow(settings: dict[str, Any]) -> None:
    found = run(replay(candidates=2, **settings), victims("adaptive", 80))
    assert rate(found) > 0.3


class Turned(Replay):
    """Victims whose gradients are the attacker's own but for a rotation and another scale."""

    def _given_away(self, *args: Any) -> tuple[Tensor, Sketch | None]:
        seen, sketch = super()._given_away(*args)
        size = seen.shape[1]
        turn = torch.linalg.qr(torch.randn(size, size, generator=derive(0, "turn")))[0]
        return 100 * seen @ turn, sketch


@pytest.mark.slow
def test_rotations_need_no_coordinates_of_the_victims() -> None:
    """Of images 350 in 450 are public, too: so few images resemble no other ones enough.

    With 300 it is luck whether guesses settle, and differs from one processor to the next.
    """
    seen = victims("key-shared", 450)
    found = {
        how: run(Turned(*public(), sketch=512, restandardize=how), seen)
        for how in (None, "global", "matched")
    }
    assert "restandardized: matched" in found["matched"][0].notes[0]
    assert rate(found["matched"]) > 0.8
    assert max(rate(found[None]), rate(found["global"])) < 0.1


@pytest.mark.slow
def test_candidates_of_everybody_tell_more_than_public_images() -> None:
    x, y = digits()
    few = Replay(*(part[:40] for part in public()), sketch=512, restandardize="matched")
    found = run(few, victims("key-shared", 300))
    own = torch.arange(300)
    decoys = draw_decoys(y[:300], y, generator=derive(0, "decoys"), own=own, count=29)
    given = [torch.cat([x[i : i + 1], x[decoys[i]]]) for i in range(300)]
    assert found[0].together is not None
    scores = found[0].together(given, y[: len(given)])
    right = sum(bool(s[0] > s[1:].max()) for s in scores) / 300
    assert [s.shape for s in scores] == [(30,)] * 300
    assert right > 0.9 > 0.5 > rate(found)
    assert run(replay(), victims("key-shared", 2))[0].together is None


def test_everybody_is_asked_about_the_own_candidates_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = digits()
    found = run(replay(restandardize="matched"), victims("key-shared", 40))
    given = [x[(y == y[i]).nonzero().flatten()[i % 3 : 5]] for i in range(40)]
    seen: list[Tensor] = []
    fit = Matched.fit

    def told(self: Matched, *args: Any) -> list[Tensor]:
        seen.append(args[3])
        assert bool((args[2].labels[None] == y[:40, None])[args[3]].all())  # of the own label
        return fit(self, *args)

    monkeypatch.setattr(Matched, "fit", told)
    assert found[0].together is not None
    found[0].together(given, y[: len(given)])
    assert seen[0].sum(dim=1).tolist() == [len(images) for images in given]


def test_narrow_directions_count_no_more_than_the_mean_one(monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[Replayed] = []
    recognize = Replay._recognize

    def told(self: Replay, learned: list[Replayed], *rest: Any) -> Any:
        known.extend(learned)
        return recognize(self, learned, *rest)

    monkeypatch.setattr(Replay, "_recognize", told)
    run(replay(), victims("key-shared", 1))
    (within,) = (one.within for one in known)
    variance = within.deviation.square()
    assert float(variance.min() / variance.mean()) < 0.1
    assert float(within.whiten.max()) <= float(variance.mean().rsqrt()) * (1 + 1e-5)


def test_few_victims_are_compared_as_they_are_and_a_note_says_so() -> None:
    matched = run(replay(restandardize="matched", secret_epochs=1), victims("key-shared", 5))
    plain = run(replay(secret_epochs=1), victims("key-shared", 5))
    assert "5 updates, too few" in matched[0].notes[1]
    candidates = digits()[0][:4]
    for one, other in zip(matched, plain, strict=True):
        assert one.score is not None
        assert other.score is not None
        torch.testing.assert_close(one.score(0, candidates), other.score(0, candidates))


@pytest.mark.parametrize("how", [None, "global", "label", "matched"])
def test_same_generator_same_scores(how: str | None) -> None:
    seen = victims("adaptive", 20)
    candidates = digits()[0][:5]
    small = replay(secret_epochs=1, restandardize=how, shadows=2)
    made: list[Tensor] = []
    for seed in (1, 1, 2):
        one = small.reconstruct(seen, generator=derive(seed))[3]
        assert one.score is not None
        made.append(one.score(0, candidates))
    assert made[0].equal(made[1])
    assert not made[0].equal(made[2])
    assert bool((made[0].abs() <= 1 + 1e-5).all())  # a mean of cosines


def test_updates_of_one_victim_have_scores_and_labels_of_their_own() -> None:
    seen = victims("key-shared", 3)
    pooled = replace(seen[0], changes=tuple(o.changes[0] for o in seen))
    candidates = digits()[0][:4]
    together, apart = run(replay(), [pooled])[0], [run(replay(), [o])[0] for o in seen]
    assert len({int(one.labels) for one in apart}) > 1  # the same images have other gradients
    assert together.score is not None
    for t, one in enumerate(apart):
        assert one.score is not None
        torch.testing.assert_close(together.score(t, candidates), one.score(0, candidates))


def test_a_gradient_is_made_once_of_an_image_and_its_label(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = digits()
    rows = (y == y[0]).nonzero().flatten()[:2].tolist()
    found = run(replay(sketch=64), victims("key-shared", max(rows) + 1))
    counts: list[int] = []
    gradients = ShadowClient.gradients

    def counted(self: ShadowClient, images: Tensor, labels: Tensor) -> Any:
        counts.append(len(images))
        assert labels.tolist() == [int(y[0])] * len(images)
        return gradients(self, images, labels)

    monkeypatch.setattr(ShadowClient, "gradients", counted)
    for row in rows:
        one = found[row]
        assert one.score is not None
        one.score(0, x[:8])
        both = one.score(0, torch.cat([x[:1], x[:1]]))
        assert both[0] == both[1]  # to the last bit
    assert counts == [8]


@pytest.mark.parametrize("how", [None, "global", "label", "matched"])
@pytest.mark.parametrize("threat", ["key-shared", "open"])
def test_shadows_that_are_the_victim_itself_are_one(
    threat: str, how: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is drawn at random there, so that a second one would say the same."""
    seen = open_victims(40) if threat == "open" else victims(threat, 40)
    made: list[int] = []
    gradients = ShadowClient.gradients

    def counted(self: ShadowClient, images: Tensor, labels: Tensor) -> Any:
        made.append(len(images))
        return gradients(self, images, labels)

    monkeypatch.setattr(ShadowClient, "gradients", counted)
    found = [run(replay(restandardize=how, shadows=shadows), seen) for shadows in (1, 3)]
    assert made == [600, 600]
    candidates = digits()[0][:5]
    for one, three in zip(*found, strict=True):
        assert one.score is not None
        assert three.score is not None
        assert one.score(0, candidates).equal(three.score(0, candidates))
        assert one.notes == three.notes


def test_progress_and_settings_are_told() -> None:
    told: list[tuple[int, int]] = []
    small = replay(shadows=2, secret_epochs=1)
    for threat in ("adaptive", "key-shared"):
        small.reconstruct(
            victims(threat, 1),
            generator=derive(0),
            progress=lambda done, total, loss: told.append((done, total)),
        )
    assert told == [(1, 2), (2, 2), (1, 1)]
    for unused in ("epochs=1,", "hidden", "variant"):
        assert unused not in repr(small).replace("secret_epochs=1,", "")
    assert "sketch=512" in repr(small)


def test_an_unknown_learning_rate_makes_no_difference() -> None:
    seen = victims("key-shared", 2)
    slow = [
        replace(o, changes=tuple({n: 1e-3 * t for n, t in c.items()} for c in o.changes))
        for o in seen
    ]
    candidates = digits()[0][:4]
    for one, other in zip(run(replay(), seen), run(replay(), slow), strict=True):
        assert one.score is not None
        assert other.score is not None
        scores = other.score(0, candidates)
        torch.testing.assert_close(scores, one.score(0, candidates), rtol=1e-3, atol=1e-3)


def test_victims_each_of_a_class_of_its_own_are_compared_without_a_rotation() -> None:
    """Less its class's mean there is nothing left of such a victim."""
    attack = replay(restandardize="matched")
    assert attack._how(torch.arange(20)) == "global"
    assert attack._how(torch.arange(20) % 10) == "matched"


def test_public_images_that_do_not_differ_within_a_class_are_refused() -> None:
    x, y = public()
    rows = [int((y == k).nonzero()[0]) for k in range(10)]
    for few in (rows, [rows[3]] * 20):
        with pytest.raises(AttackError, match="two different images of one class"):
            run(Replay(x[few], y[few], sketch=512), victims("key-shared", 1))


def test_misfits_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"restandardization.*matched"):
        replay(restandardize="transport")
