"""Attacks on shared gradients: from an observation to images and labels."""

from fedkl.attacks.base import Attack, Progress, Reconstruction
from fedkl.attacks.closed_form import ClosedForm, label_counts, penultimate_features
from fedkl.attacks.counting import Counted
from fedkl.attacks.generators import (
    ConditionalGenerator,
    cached_generator,
    load_generator,
    save_generator,
    train_generator,
)
from fedkl.attacks.ggl import GGL
from fedkl.attacks.grnn import GRNN
from fedkl.attacks.matching import GradientMatching
from fedkl.attacks.peel import Peel
from fedkl.attacks.pixels import DLG, IDLG, InvertingGradients
from fedkl.attacks.registry import (
    ATTACKS,
    EFFORTS,
    NEED_MANY,
    NEED_PUBLIC,
    RECOGNIZING,
    SEARCHING,
    Resources,
    check_installed,
    make_attack,
)
from fedkl.attacks.secrets import Held, Secrets

__all__ = [
    "ATTACKS",
    "DLG",
    "EFFORTS",
    "GGL",
    "GRNN",
    "IDLG",
    "NEED_MANY",
    "NEED_PUBLIC",
    "RECOGNIZING",
    "SEARCHING",
    "Attack",
    "ClosedForm",
    "ConditionalGenerator",
    "Counted",
    "GradientMatching",
    "Held",
    "InvertingGradients",
    "Peel",
    "Progress",
    "Reconstruction",
    "Resources",
    "Secrets",
    "cached_generator",
    "check_installed",
    "label_counts",
    "load_generator",
    "make_attack",
    "penultimate_features",
    "save_generator",
    "train_generator",
]
