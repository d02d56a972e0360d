"""Messages about one of a thing speak of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedkl.data import partition
from fedkl.errors import FedKLError, number_of
from fedkl.federation import RenewalConfig
from fedkl.federation.renewal import judge
from fedkl.rng import derive

STRICT = RenewalConfig(budget=1, on_spent="error")


def deal(images: int, clients: int, samples: int | None = None) -> None:
    labels = torch.zeros(images, dtype=torch.int64)
    partition(labels, clients, "iid", generator=derive(0, "deal"), samples=samples)


ONE: list[tuple[Callable[[], object], str]] = [
    (lambda: deal(1, 2), "^2 clients for 1 image;"),
    (lambda: deal(3, 1, 9), "^1 client with 9 images each: that takes 9 images, and there are 3"),
    (
        lambda: judge(STRICT, client=0, clients=1, round_=2, last=1, spent=1, ahead=1),
        "has served 1 presentation and this round takes 1 more",
    ),
]


@pytest.mark.parametrize("act, message", ONE)
def test_one_of_a_thing(act: Callable[[], object], message: str) -> None:
    with pytest.raises(FedKLError, match=message):
        act()


def test_numbers_and_their_nouns() -> None:
    assert [number_of(n, "pad") for n in (0, 1, 2)] == ["0 pads", "1 pad", "2 pads"]
