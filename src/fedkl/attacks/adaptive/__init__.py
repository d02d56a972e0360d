"""Attackers who know about the lock: they search its secrets, train their own, or craft weights."""

from fedkl.attacks.adaptive.crafting import Fishing, catch, craft
from fedkl.attacks.adaptive.keys import GuessedKey, LockGradientKey, RegressedKey, read_key
from fedkl.attacks.adaptive.replay import Replay
from fedkl.attacks.adaptive.replay_relations import ReplayRelations
from fedkl.attacks.adaptive.retrieval import Retrieval
from fedkl.attacks.adaptive.shadow import Shadow
from fedkl.attacks.adaptive.shadow_client import Public, train_secrets
from fedkl.attacks.adaptive.threats import ATTACKERS, adaptive_for
from fedkl.attacks.adaptive.unknowns import AdaptiveSecrets, FreeAffines, FreeSecrets, Start
from fedkl.attacks.adaptive.wrapper import Adaptive

__all__ = [
    "ATTACKERS",
    "Adaptive",
    "AdaptiveSecrets",
    "Fishing",
    "FreeAffines",
    "FreeSecrets",
    "GuessedKey",
    "LockGradientKey",
    "Public",
    "RegressedKey",
    "Replay",
    "ReplayRelations",
    "Retrieval",
    "Shadow",
    "Start",
    "adaptive_for",
    "catch",
    "craft",
    "read_key",
    "train_secrets",
]
