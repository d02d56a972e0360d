"""Defenses a client can put between its data and the server."""

from fedkl.defenses.base import Composed, Defense, LockDefense, NoDefense
from fedkl.defenses.registry import DEFENSES, DefenseConfig, make_defense

__all__ = [
    "DEFENSES",
    "Composed",
    "Defense",
    "DefenseConfig",
    "LockDefense",
    "NoDefense",
    "make_defense",
]
