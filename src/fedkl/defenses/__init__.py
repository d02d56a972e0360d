"""Defenses a client can put between its data and the server."""

from fedkl.defenses.base import Composed, Defense, LockDefense, NoDefense, Sending
from fedkl.defenses.noise import Noise
from fedkl.defenses.prune import Prune
from fedkl.defenses.registry import DEFENSES, DefenseConfig, make_defense, parts_of

__all__ = [
    "DEFENSES",
    "Composed",
    "Defense",
    "DefenseConfig",
    "LockDefense",
    "NoDefense",
    "Noise",
    "Prune",
    "Sending",
    "make_defense",
    "parts_of",
]
