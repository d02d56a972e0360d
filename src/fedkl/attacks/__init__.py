"""Attacks on shared gradients: from an observation to images and labels."""

from fedkl.attacks.base import Attack, Progress, Reconstruction
from fedkl.attacks.matching import GradientMatching
from fedkl.attacks.pixels import DLG, IDLG, InvertingGradients
from fedkl.attacks.registry import ATTACKS, EFFORTS, make_attack
from fedkl.attacks.secrets import Held, Secrets

__all__ = [
    "ATTACKS",
    "DLG",
    "EFFORTS",
    "IDLG",
    "Attack",
    "GradientMatching",
    "Held",
    "InvertingGradients",
    "Progress",
    "Reconstruction",
    "Secrets",
    "make_attack",
]
