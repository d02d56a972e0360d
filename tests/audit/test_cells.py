"""One victim that an attack cannot treat costs its cell that victim, and no verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from audithelp import small_audit

from fedkl.attacks import Attack, ClosedForm, InvertingGradients, Progress, Reconstruction
from fedkl.attacks.adaptive import Replay, ReplayRelations, Retrieval, Shadow
from fedkl.attacks.base import each
from fedkl.audit import arsenal, run_audit
from fedkl.audit.cells import on_each
from fedkl.errors import AttackError
from fedkl.models import build
from fedkl.observation import OPEN, Observation, Training
from fedkl.rng import derive


def linear(count: int) -> list[Observation]:
    """Victims of a linear model: what the closed form is exact for."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand(p.shape, generator=derive(0, "weights")) - 0.5)
    found = []
    for i in range(count):
        x = torch.rand(1, 1, 8, 8, generator=derive(i, "x"))
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.tensor([i % 4])).backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append(
            Observation(
                model=model,
                kind="gradient",
                changes=(gradient,),
                image_shape=(1, 8, 8),
                num_classes=4,
                training=Training(),
                threat=OPEN,
            )
        )
    return found


PUBLIC = (torch.rand(40, 1, 8, 8, generator=derive(0, "public")), torch.arange(40) % 4)


def spoilt(observation: Observation, value: float) -> Observation:
    change = {n: torch.full_like(g, value) for n, g in observation.changes[0].items()}
    return replace(observation, changes=(change,))


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize(
    "attack, value, reason",
    [
        (ClosedForm(), 0.0, "zero everywhere"),
        (ClosedForm(), torch.nan, "NaN"),
        (InvertingGradients(iterations=2), torch.nan, "NaN"),
        (Shadow(torch.rand(40, 1, 8, 8), torch.arange(40) % 4, hidden=0), 0.0, "is zero"),
        (Replay(*PUBLIC), 0.0, "is zero"),
        (ReplayRelations(*PUBLIC), 0.0, "is zero"),
        (Retrieval(*PUBLIC, epochs=1), 0.0, "is zero"),
    ],
    ids=[
        "closed-form",
        "closed-form nan",
        "inverting-gradients nan",
        "shadow",
        "replay",
        "replay-relations",
        "retrieval",
    ],
)
def test_the_others_are_attacked_as_if_it_had_not_been_there(
    attack: Attack, value: float, reason: str, place: int
) -> None:
    victims = linear(4)
    odd = [spoilt(o, value) if i == place else o for i, o in enumerate(victims)]
    with pytest.raises(AttackError) as raised:
        attack.reconstruct(odd, generator=derive(0, "a"))
    assert list(raised.value.victims) == [place]
    found, failed = on_each(attack, odd, lambda: derive(0, "a"))
    assert reason in failed.pop(place)
    assert not failed
    left = [i for i in range(4) if i != place]
    assert sorted(found) == left
    alone = attack.reconstruct([victims[i] for i in left], generator=derive(0, "a"))
    for i, one in zip(left, alone, strict=True):
        assert torch.equal(found[i].images, one.images)


def test_an_update_of_several_images_that_is_zero_is_left_out() -> None:
    victims = [replace(o, training=Training(batch_size=2)) for o in linear(4)]
    odd = [spoilt(victims[0], 0.0), spoilt(victims[1], 1e30), *victims[2:]]
    found, failed = on_each(Replay(*PUBLIC), odd, lambda: derive(0, "a"))
    assert (sorted(found), sorted(failed)) == ([2, 3], [0, 1])


@pytest.mark.parametrize("make", [Replay, ReplayRelations, Retrieval])
@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_a_victim_whose_update_is_scaled_is_recognized_as_before(
    make: type[Retrieval], scale: float
) -> None:
    """Its direction is all there; size is asked apart, where it is asked."""
    victims = linear(4)
    attack = make(*PUBLIC)
    (first, *_) = attack.reconstruct(victims, generator=derive(0, "a"))
    big = {n: g * scale for n, g in victims[0].changes[0].items()}
    victims[0] = replace(victims[0], changes=(big,))
    (scaled, *_) = attack.reconstruct(victims, generator=derive(0, "a"))
    candidates = torch.cat([torch.rand(9, 1, 8, 8, generator=derive(5, "x")), PUBLIC[0][:1]])
    labels = torch.zeros(4, dtype=torch.int64)
    if make is ReplayRelations:  # whose size is odd, and whose cosines are not
        assert first.together is not None
        assert scaled.together is not None
        before, after = (one.together([candidates] * 4, labels) for one in (first, scaled))
        assert all(bool(scores.isfinite().all()) for scores in after)
        torch.testing.assert_close(after[1].argmax(), before[1].argmax())
    else:
        assert first.score is not None
        assert scaled.score is not None
        before, after = (one.score(0, candidates) for one in (first, scaled))
        assert len(before.unique()) == 10
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)


def test_all_that_fail_are_named_at_once_and_none_is_an_error() -> None:
    victims = [spoilt(o, 0.0) for o in linear(3)]
    tries: list[int] = []

    class Counting(ClosedForm):
        def reconstruct(self, *args: Any, **given: Any) -> list[Reconstruction]:
            tries.append(1)
            return super().reconstruct(*args, **given)

    with pytest.raises(AttackError, match="the gradient of"):
        on_each(Counting(), victims, lambda: derive(0, "a"))
    assert len(tries) == 1


def test_everyone_who_is_left_out_is_so_for_its_own_reason() -> None:
    victims = linear(4)
    odd = [spoilt(victims[0], 0.0), victims[1], spoilt(victims[2], 1e25), victims[3]]
    attack = InvertingGradients(iterations=2)
    _, failed = on_each(attack, odd, lambda: derive(0, "a"))
    assert sorted(failed) == [0, 2]
    assert "is zero" in failed[0]
    assert "is too large" in failed[2]


def test_what_is_about_the_model_is_about_all() -> None:
    model = build("lenet", num_classes=4, channels=1, image_size=16, generator=derive(0, "m"))
    victims = [replace(o, model=model) for o in linear(2)]
    with pytest.raises(AttackError, match="expected a linear one"):
        on_each(ClosedForm(), victims, lambda: derive(0, "a"))


class Squeamish(InvertingGradients):
    """Refuses the first victims of every call, by their labels' gradient."""

    refused = 1

    def reconstruct(
        self,
        observations: Sequence[Observation],
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        **further: Any,
    ) -> list[Reconstruction]:
        marks = [float(next(iter(o.changes[0].values())).sum()) for o in observations]
        odd = sorted(marks)[: max(0, len(marks) - ALL + self.refused)]

        def look(observation: Observation) -> None:
            if float(next(iter(observation.changes[0].values())).sum()) in odd:
                raise AttackError("the gradient is odd.")

        each(observations, look)
        return super().reconstruct(observations, generator=generator, progress=progress, **further)


ALL = 3
CELLS = 4  # none, norm, fedbn by key holder and adaptive


@pytest.mark.parametrize("seeds", [1, 2])
def test_rows_of_who_was_left_out_hold_the_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: int
) -> None:
    monkeypatch.setattr(arsenal, "make_attack", lambda *_, **__: Squeamish(iterations=3))
    audit = small_audit(stage="initial", defenses=("norm",), images=ALL, seeds=seeds, batch_size=2)
    result = run_audit(audit, tmp_path)
    assert result["skipped"] == []
    cells = {(line["defense"], line["cell"]) for line in result["left_out"]}
    assert len(result["left_out"]) == len(cells) == CELLS * seeds  # one of each
    for entry in result["summary"]:
        assert (entry["n"], entry["images"]) == (ALL, 2 * ALL * seeds)
        assert 1 <= entry["left_out"] <= seeds
        assert "were beyond the attack" in entry["reason"]
        assert entry["ceiling"]["advantage"] > entry["advantage"]["high"]
    absent = [row for row in result["rows"] if row["left_out"] is not None]
    assert len(absent) == CELLS * seeds * 2
    for row in absent:
        assert row["advantage"] == 0
        assert row["identified"] == row["floor_identified"]
        assert row["label_found"] is None
    named = {(one["cell"], one["victim"]) for one in result["left_out"]}
    pictured = {(p["defense"], p["image"]) for p in result["pictures"]}
    assert len(named) == CELLS * seeds
    missing = {(row["defense"], row["image"]) for row in absent if row["seed"] == 0}
    assert not pictured & missing
    # What was done is not done again.
    (tmp_path / "audit.json").unlink()
    monkeypatch.setattr(arsenal, "make_attack", None)
    assert run_audit(audit, tmp_path, resume=True)["rows"] == result["rows"]
