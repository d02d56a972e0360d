"""Every scheme: disjoint, non-empty, in range, and with the law that its paper describes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedkl.data import PARTITIONS, partition
from fedkl.errors import ConfigError, DataError
from fedkl.rng import derive

SCHEMES = sorted(PARTITIONS)


def some_labels(count: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (count,), generator=derive(seed, "labels", count, classes))


@given(
    scheme=st.sampled_from(SCHEMES),
    clients=st.integers(1, 8),
    count=st.integers(40, 90),
    classes=st.integers(1, 10),
    samples=st.none() | st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_parts_are_disjoint_non_empty_and_in_range(
    scheme: str, clients: int, count: int, classes: int, samples: int | None, seed: int
) -> None:
    labels = some_labels(count, classes, seed)
    parts = partition(
        labels, clients, scheme, generator=derive(seed, "p"), alpha=1.0, samples=samples
    )
    together = torch.cat(parts)
    assert len(parts) == clients
    assert all(len(part) >= 1 and part.dtype == torch.int64 for part in parts)
    assert together.min() >= 0
    assert together.max() < count
    assert len(together.unique()) == len(together)
    assert all((part.diff() > 0).all() for part in parts)
    if samples is None:
        assert len(together) == count
    else:
        assert max(len(part) for part in parts) <= samples
        assert scheme != "iid" or {len(part) for part in parts} == {samples}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_generator_decides_and_nothing_else(scheme: str) -> None:
    labels, state = some_labels(200, 10), torch.get_rng_state()
    first, again, other = (
        torch.cat(partition(labels, 4, scheme, generator=derive(seed, "p"))) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_iid_parts_are_equal_and_mixed(generator: torch.Generator) -> None:
    labels = torch.arange(10).repeat_interleave(100)  # sorted: an unshuffled cut would show
    parts = partition(labels, 3, generator=generator)
    assert sorted(len(part) for part in parts) == [333, 333, 334]
    for part in parts:
        assert labels[part].bincount(minlength=10).min() > 10


def test_shards_give_each_client_few_classes(generator: torch.Generator) -> None:
    labels = torch.arange(10).repeat(100)
    parts = partition(labels, 10, "shards", generator=generator, shards_per_client=2)
    assert all(len(part) == 100 for part in parts)
    assert all(len(labels[part].unique()) <= 2 for part in parts)
    # Dealt in order, each would get two neighbors, here two halves of one class.
    assert sum(len(labels[part].unique()) for part in parts) > 10
    single = partition(labels, 10, "shards", generator=generator, shards_per_client=1)
    assert sorted(int(labels[part].unique()) for part in single) == list(range(10))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_which_images_of_a_class_a_client_gets_is_chance(
    scheme: str, generator: torch.Generator
) -> None:
    parts = partition(torch.zeros(100).long(), 2, scheme, generator=generator, alpha=100.0)
    for part in parts:
        assert (part.diff() > 1).sum() > 5  # neither a block nor two of them


def skew(labels: Tensor, parts: list[Tensor]) -> float:
    """Mean over clients of the largest share that one class has."""
    shares = [labels[part].bincount(minlength=10).max() / len(part) for part in parts]
    return float(torch.stack(shares).mean())


def test_a_smaller_alpha_makes_clients_more_unequal() -> None:
    labels = torch.arange(10).repeat(300)
    skews = [
        skew(labels, partition(labels, 10, "dirichlet", generator=derive(3, "d"), alpha=alpha))
        for alpha in (0.1, 1.0, 1000.0)
    ]
    assert skews[0] > 0.4 > skews[1] > 0.15 > skews[2]


def test_dirichlet_shares_have_the_moments_of_the_law() -> None:
    # A client's share of a class has mean 1/n and variance (n - 1) / (n**2 (n alpha + 1)).
    labels, clients, alpha = torch.arange(2).repeat(1000), 4, 2.0
    shares = [
        labels[part].bincount(minlength=2) / 1000
        for seed in range(150)
        for part in partition(
            labels, clients, "dirichlet", generator=derive(seed, "m"), alpha=alpha
        )
    ]
    variance = float(torch.stack(shares).var())
    assert variance == pytest.approx(3 / (16 * 9), rel=0.2)


@pytest.mark.parametrize("clients", [0, -1, 11])
def test_numbers_of_clients_out_of_range(clients: int, generator: torch.Generator) -> None:
    with pytest.raises(DataError, match="clients for 10 images"):
        partition(torch.arange(10), clients, generator=generator)


@pytest.mark.parametrize(
    "scheme, options, expected",
    [
        ("iid", {"samples": 6}, "that takes 12"),
        ("iid", {"samples": 0}, "samples is 0"),
        ("shards", {"shards_per_client": 0}, "1 or more shards"),
        ("shards", {"shards_per_client": 6}, "at most 10 shards"),
        ("dirichlet", {"alpha": 0.0}, "above 0"),
        ("dirichlet", {"alpha": -1.0}, "above 0"),
        ("dirichlet", {"alpha": float("nan")}, "above 0"),
        ("dirichlet", {"alpha": float("inf")}, "above 0"),
    ],
)
def test_options_out_of_range(
    scheme: str, options: dict[str, float], expected: str, generator: torch.Generator
) -> None:
    with pytest.raises(DataError, match=expected):
        partition(torch.arange(10), 2, scheme, generator=generator, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [1e-3, 1e-300])
def test_hopeless_dirichlet_draws_end_in_an_error(alpha: float, generator: torch.Generator) -> None:
    with pytest.raises(DataError, match="1000 draws"):
        partition(torch.zeros(50).long(), 40, "dirichlet", generator=generator, alpha=alpha)


def test_unknown_scheme_names_the_nearest(generator: torch.Generator) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'shards'"):
        partition(torch.arange(10), 2, "shard", generator=generator)
