"""Rotations between two clients' coordinates."""

from __future__ import annotations

import torch

from fedkl.attacks.adaptive.transport import Transport, procrustes
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
    moved = transport.move(seen, torch.full((20,), 4))  # a class that we have no image of
    assert moved.shape == (20, 12)
    assert bool(moved.isfinite().all())
    # Five directions of twelve: what they do not span is our mean.
    rank = int(torch.linalg.matrix_rank(moved - moved.mean(dim=0)))
    assert rank <= 5
