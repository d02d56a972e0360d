"""Flower lives in an environment of its own (`make test` knows it); elsewhere these are skipped."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before flwr is loaded, and inherited by the processes that tests start.
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
sys.path.insert(0, str(Path(__file__).parents[1] / "federation"))


def pytest_configure(config: pytest.Config) -> None:
    """Third parties at fault: typer below 0.21, which Flower asks for, with click 8.5."""
    config.addinivalue_line("filterwarnings", "ignore:.*click.*:DeprecationWarning")
