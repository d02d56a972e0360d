"""What all tests share: one thread, repeatable randomness, no windows."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

# Before torch is loaded, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

import fedkl.key
from fedkl.rng import derive


def _key_of_the_place() -> SimpleNamespace:
    """Randomness of keys that test modules generate when they are imported: that of the line."""
    used: Counter[str] = Counter()

    def token_bytes(length: int) -> bytes:
        frame = sys._getframe(2)  # whoever called Key.generate
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        used[place] += 1
        return hashlib.shake_256(f"{place} {used[place]}".encode()).digest(length)

    return SimpleNamespace(token_bytes=token_bytes)


fedkl.key.secrets = _key_of_the_place()
torch.set_num_threads(1)
settings.register_profile("fedkl", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fedkl")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Layers that a test builds do not depend on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_keys(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keys that a test generates in its own process are the same in every run.

    What a lock does to a model differs from key to key, and with it how well attacks do.
    """
    counter = itertools.count()

    def token_bytes(length: int) -> bytes:
        seed = f"{request.node.nodeid} {next(counter)}".encode()
        return hashlib.shake_256(seed).digest(length)

    with patch("fedkl.key.secrets", SimpleNamespace(token_bytes=token_bytes)):
        yield


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of the test's own, the same in every run."""
    return derive(0, request.node.nodeid)
