"""What all tests share: one thread, repeatable randomness, no windows."""

from __future__ import annotations

import os

# Before torch is loaded, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

from fedkl.rng import derive

torch.set_num_threads(1)
settings.register_profile("fedkl", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fedkl")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Layers that a test builds do not depend on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of the test's own, the same in every run."""
    return derive(0, request.node.nodeid)
