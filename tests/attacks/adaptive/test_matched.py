"""Rotations found from victims nobody knows, and public images that resemble them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedkl.attacks.adaptive.matched import Matched, Pool, cosines, rotated
from fedkl.attacks.adaptive.within import Within
from fedkl.errors import AttackError
from fedkl.rng import derive

CLASSES, SIZE = 10, 40


def turn(seed: int) -> Tensor:
    made: Tensor = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=derive(seed, "turn")))[0]
    return made


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images that resemble one another: noisy copies of 60 patterns a class."""
    labels, spread = torch.arange(count) % CLASSES, torch.linspace(3, 0.7, SIZE)
    patterns = spread * torch.randn(CLASSES, 60, SIZE, generator=derive(0, "patterns"))
    generator = derive(seed, "images")
    which = torch.randint(60, (count,), generator=generator)
    noise = 0.4 * spread * torch.randn(count, SIZE, generator=generator)
    return patterns[labels, which] + noise, labels


class Case:
    """Victims seen by a client of unknown rotation, and shadows of known ones."""

    def __init__(self, count: int, shadows: int = 1, public: int = 3000) -> None:
        (self.seen, self.labels), (theirs, labels) = images(count, 1), images(public, 2)
        self.theirs = self.seen @ turn(99)
        white = [Within(theirs @ turn(j), labels, CLASSES, SIZE, 0.1) for j in range(shadows)]
        self.truth = [w(self.seen @ turn(j), self.labels) for j, w in enumerate(white)]
        pool = Pool([w(theirs @ turn(j), labels) for j, w in enumerate(white)], labels)
        self.matched = Matched(pool, [w.classes for w in white])

    def found(self, *given: Tensor | Pool) -> float:
        """How often the true image is the closest of all victims' of its class."""
        moved = self.matched.fit(self.theirs, self.labels, *given)  # type: ignore[arg-type]
        scores = sum(cosines(m, t) for m, t in zip(moved, self.truth, strict=True))
        assert isinstance(scores, Tensor)
        scores = scores.masked_fill(self.labels[:, None] != self.labels[None], -torch.inf)
        return float((scores.argmax(dim=1) == torch.arange(len(scores))).double().mean())


def test_many_victims_are_brought_into_coordinates_of_which_class_means_tell_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(1000)
    assert case.found() > 0.9  # a guesser: 0.01
    monkeypatch.setattr(Matched, "_turn", lambda self, x, labels, moved, *_: moved)
    assert case.found() < 0.1  # what class means begin, and nothing finishes


def test_every_shadow_gets_a_rotation_of_its_own() -> None:
    assert Case(400, shadows=3).found() > 0.9


def test_candidates_tell_more_than_public_images() -> None:
    case = Case(400, public=400)
    pool = Pool(case.truth, case.labels)
    allowed = case.labels[:, None] == case.labels[None]
    assert case.found() < 0.3  # few public images
    assert case.found(pool, allowed) > 0.9


def test_public_images_are_guessed_among_first_and_candidates_thereafter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, asked = Case(100, public=300), list[tuple[Pool, bool]]()
    turn = Matched._turn

    def told(self: Matched, *given: Any) -> list[Tensor]:
        asked.append((given[3], given[4] is not None))
        return turn(self, *given)

    monkeypatch.setattr(Matched, "_turn", told)
    pool, allowed = Pool(case.truth, case.labels), case.labels[:, None] == case.labels[None]
    case.matched.fit(case.theirs, case.labels, pool, allowed)
    public = [pool is case.matched.public for pool, _ in asked]
    assert 0 < sum(public) < len(public)
    assert public == sorted(public, reverse=True)
    assert all(masked != first for first, (_, masked) in zip(public, asked, strict=True))


def test_exchanged_victims_are_found_no_more_than_by_guessing() -> None:
    """Guessing in turn with fitting does not talk itself into the truth."""
    case = Case(400)
    for k in range(CLASSES):
        rows = (case.labels == k).nonzero().flatten()
        case.theirs[rows] = case.theirs[rows.roll(7)]
    pool, allowed = Pool(case.truth, case.labels), case.labels[:, None] == case.labels[None]
    assert case.found() < 0.1
    assert case.found(pool, allowed) < 0.1


def test_one_turn_is_the_naive_one() -> None:
    case = Case(60, shadows=2, public=80)
    x = torch.randn(60, 8, generator=derive(3))
    moved = [torch.randn(60, 5, generator=derive(4, str(j))) for j in range(2)]
    pool = case.matched.public
    allowed = torch.rand(60, 80, generator=derive(5)) < 0.7
    made = case.matched._turn(x, case.labels, moved, pool, allowed, 7)
    for j in range(2):
        wanted = torch.empty(60, 7)
        for i in range(60):
            rows = [
                m for m in range(80) if pool.labels[m] == case.labels[i] and bool(allowed[i, m])
            ]
            score = torch.zeros(len(rows))
            for side, mine in zip(pool.sides, moved, strict=True):
                own = normalize(mine[i], dim=0)
                score += torch.stack([own @ normalize(side[m, :5], dim=0) for m in rows]) / 2
            chosen = (10 * 2**0.5 * score).softmax(dim=0)
            wanted[i] = sum(p * pool.sides[j][m, :7] for p, m in zip(chosen, rows, strict=True))
        u, _, v = torch.linalg.svd(x[:, :7].T @ wanted)
        torch.testing.assert_close(made[j], x[:, :7] @ (u @ v), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("labels", "size"),
    [([0] * 50, 0), ([0, 1], 0), ([0, 1, 2, 3, 0], 1), ([*range(10)] * 10, 20),
     ([*range(10)] * 1000, 256), ([*range(100)], 0), ([0, *range(100)], 1)],
)  # fmt: skip
def test_directions_that_victims_tell(labels: list[int], size: int) -> None:
    assert rotated(torch.tensor(labels)) == size


def test_too_few_victims_are_refused_and_a_class_without_images_does_no_harm() -> None:
    case = Case(60, public=300)
    with pytest.raises(AttackError, match="got 3 victims"):
        case.matched.fit(case.theirs[:3], case.labels[:3])
    keep = case.matched.public.labels != 4
    few = Pool([side[keep] for side in case.matched.public.sides], case.matched.public.labels[keep])
    (moved,) = Matched(few, case.matched.means).fit(case.theirs, case.labels)
    assert moved.shape == (60, 12)
    assert bool(moved.isfinite().all())
