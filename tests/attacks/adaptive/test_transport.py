"""Rotations between two clients' coordinates."""

from __future__ import annotations

import pytest
import torch

from fedkl.attacks.adaptive.transport import Transport, directions
from fedkl.attacks.adaptive.within import procrustes
from fedkl.errors import AttackError
from fedkl.rng import derive


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    made: torch.Tensor = torch.linalg.qr(torch.randn(size, size, generator=derive(seed)))[0]
    return made


def test_procrustes_finds_the_rotation() -> None:
    x, turn = torch.randn(50, 6, generator=derive(1)), rotation(6)
    torch.testing.assert_close(procrustes(x, x @ turn), turn, rtol=1e-4, atol=1e-4)
    noisy = procrustes(x, x @ turn + 0.1 * torch.randn(50, 6, generator=derive(2)))
    torch.testing.assert_close(noisy @ noisy.T, torch.eye(6), rtol=1e-4, atol=1e-4)


def test_another_clients_rotation_is_undone() -> None:
    """Classes apart in every direction: their means alone nearly tell the rotation."""
    generator = derive(0, "clouds")
    labels = torch.arange(1200) % 10
    centers = 4 * torch.randn(10, 8, generator=generator)
    spread = torch.linspace(1.5, 0.5, 8)

    def cloud() -> torch.Tensor:
        return centers[labels] + spread * torch.randn(1200, 8, generator=generator)

    ours, seen = cloud(), cloud()
    theirs = seen @ rotation(8)
    moved = Transport(ours, labels, 10).move(theirs, labels)
    before = float((theirs - seen).square().mean())
    after = float((moved - seen).square().mean())
    assert after < 0.02 * before


def test_few_victims_use_few_directions_and_missing_classes_do_no_harm() -> None:
    generator = derive(0, "few")
    ours, labels = torch.randn(200, 12, generator=generator), torch.arange(200) % 4
    seen = torch.randn(20, 12, generator=generator)
    transport = Transport(ours, labels, 5)
    theirs = torch.arange(20) % 2 + 3  # 4 is a class that we have no image of
    moved = transport.move(seen, theirs)
    assert moved.shape == (20, 12)
    assert bool(moved.isfinite().all())
    # Five directions of twelve: what they do not span is our mean.
    rank = int(torch.linalg.matrix_rank(moved - moved.mean(dim=0)))
    assert rank == 5


def test_neighbours_finish_what_class_means_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clouds that overlap, skewed so that no direction looks like its mirror image."""
    generator = derive(0, "shape")
    labels = torch.arange(4000) % 10
    centers = torch.randn(10, 8, generator=generator)
    spread = torch.linspace(3, 0.7, 8)

    def cloud() -> torch.Tensor:
        draw = torch.rand(4000, 8, generator=generator).log().neg() - 1
        return centers[labels] + spread * draw

    ours, seen = cloud(), cloud()
    theirs = seen @ rotation(8, 3)
    before = (theirs - seen).square().mean()

    def left() -> float:
        moved = Transport(ours, labels, 10).move(theirs, labels)
        return float((moved - seen).square().mean() / before)

    done = left()
    assert done < 0.005
    monkeypatch.setattr("fedkl.attacks.adaptive.transport._ROUNDS", 0)
    assert left() > 3 * done


def test_one_victim_a_class_has_nothing_within_classes_and_blows_up_nothing() -> None:
    generator = derive(0, "hundred")
    ours, labels = torch.randn(1000, 32, generator=generator), torch.arange(1000) % 100
    for count in (104, 128, 400):
        seen = torch.randn(count, 32, generator=generator)
        moved = Transport(ours, labels, 100).move(seen, torch.arange(count) % 100)
        assert float(moved.abs().max()) < 10 * float(ours.abs().max())
    for few in (torch.arange(64), torch.arange(100) % 100, torch.zeros(64, dtype=torch.int64)):
        assert directions(few) == 0
        with pytest.raises(AttackError, match="tell a rotation"):
            Transport(ours, labels, 100).move(seen[: len(few)], few)
    assert directions(torch.arange(400) % 100) == 64
    assert directions(torch.arange(16) % 10) == 4
    assert directions(torch.arange(104) % 100) == 4
