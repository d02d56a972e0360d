"""What an update is the sum of."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import nnls
from torch.nn.functional import normalize

from fedkl.attacks.adaptive.mixture import best, nonnegative, parts
from fedkl.rng import derive


def test_weights_are_those_of_an_active_set_solver() -> None:
    generator = derive(0)
    atoms = torch.rand(20, 60, generator=generator, dtype=torch.float64)
    target = torch.rand(60, generator=generator, dtype=torch.float64)
    want, _ = nnls(atoms.T.numpy(), target.numpy())
    assert (want == 0).any()
    np.testing.assert_allclose(nonnegative(atoms, target).numpy(), want, atol=1e-5)
    # More atoms than entries: other weights may explain as much, but not more.
    many = torch.rand(80, 60, generator=generator, dtype=torch.float64)
    want, left = nnls(many.T.numpy(), target.numpy())
    weights = nonnegative(many, target)
    assert (weights >= 0).all()
    assert float((weights @ many - target).norm()) <= left + 1e-3


def test_atoms_that_are_much_alike_are_told_apart() -> None:
    """As gradients of one class are; steps along the gradient spread the weights over all."""
    generator = derive(2)
    common = torch.randn(300, generator=generator)
    atoms = normalize(common + 0.1 * torch.randn(200, 300, generator=generator), dim=1)
    want = torch.zeros(200)
    want[:12] = 1 / 12
    torch.testing.assert_close(nonnegative(atoms, want @ atoms), want, atol=2e-3, rtol=0)


def test_atoms_that_cancel_each_other_are_weighed() -> None:
    """As those of two images do when their mean is taken out."""
    found = nonnegative(torch.tensor([[0.6, 0.8], [-0.6, -0.8]]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.6, 0.0]), atol=1e-5, rtol=0)


def test_equal_atoms_share_their_weight_and_what_is_no_number_has_none() -> None:
    atoms = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = nonnegative(atoms, torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5, 0.0]), atol=1e-5, rtol=0)
    assert nonnegative(atoms, torch.tensor([torch.nan, 0.0])).isnan().all()


def test_parts_of_a_sum_stand_out_and_the_scale_of_the_sum_does_not_count() -> None:
    generator = derive(1)
    atoms = normalize(
        torch.randn(400, 200, generator=generator) + 0.5, dim=1
    )  # more than equations
    true = torch.randperm(400, generator=generator)[:8]
    target = (atoms[true] * torch.linspace(0.3, 1, 8)[:, None]).sum(dim=0)
    found = parts(atoms, target)
    assert set(found.topk(8).indices.tolist()) == set(true.tolist())
    torch.testing.assert_close(parts(atoms, 1e6 * target), found, atol=1e-4, rtol=1e-3)
    # Inner products alone do not tell them.
    assert set((atoms @ target).topk(8).indices.tolist()) != set(true.tolist())


def test_atoms_of_no_length_and_an_empty_sum_weigh_nothing() -> None:
    assert parts(torch.zeros(3, 4), torch.ones(4)).eq(0).all()
    assert parts(torch.ones(3, 4), torch.zeros(4)).eq(0).all()


def test_among_atoms_without_a_weight_the_inner_product_decides() -> None:
    atoms = torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, -0.5, 0.9]])
    found = parts(atoms, torch.tensor([1.0, 0.5, 0.1]))
    assert found.argsort(descending=True).tolist() == [0, 2, 1]


def test_the_greatest_parts_come_first_and_few_come_again() -> None:
    atoms = torch.eye(4)
    target = torch.tensor([0.1, 0.9, 0.0, 0.5])
    assert best(atoms, target, 2).tolist() == [1, 3]
    assert best(atoms[:2], target, 3).tolist() == [1, 0, 1]
