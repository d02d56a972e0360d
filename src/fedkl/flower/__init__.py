"""FedKL on Flower: the same client update and the same aggregate over a real network.

Needs the extra ``fedkl[flower]``.
"""

from __future__ import annotations

from importlib.util import find_spec

from fedkl.errors import ConfigError

if find_spec("flwr") is None:
    raise ConfigError("fedkl.flower needs Flower; install it with: pip install 'fedkl[flower]'")

from fedkl.flower.client import client_app
from fedkl.flower.guard import Secrets
from fedkl.flower.mod import group_key_of, key_of, keylock_mod
from fedkl.flower.server import server_app
from fedkl.flower.settings import PROTOCOL, FlowerConfig, settings_from
from fedkl.flower.strategies import STRATEGIES

__all__ = [
    "PROTOCOL",
    "STRATEGIES",
    "FlowerConfig",
    "Secrets",
    "client_app",
    "group_key_of",
    "key_of",
    "keylock_mod",
    "server_app",
    "settings_from",
]
