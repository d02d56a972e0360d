"""The attacks by name, at three efforts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from fedkl.attacks.base import Attack
from fedkl.attacks.pixels import DLG, IDLG, InvertingGradients
from fedkl.errors import ConfigError, unknown

EFFORTS: Final = ("quick", "standard", "paper")

# Evaluations and restarts per effort; "paper" is the published budget.
ATTACKS: Final[Mapping[str, Mapping[str, Callable[[], Attack]]]] = {
    "dlg": {
        "quick": lambda: DLG(iterations=300, restarts=2),
        "standard": lambda: DLG(iterations=1000, restarts=4),
        "paper": lambda: DLG(iterations=6000, restarts=4),
    },
    "idlg": {
        "quick": lambda: IDLG(iterations=300, restarts=2),
        "standard": lambda: IDLG(iterations=1000, restarts=4),
        "paper": lambda: IDLG(iterations=6000, restarts=4),
    },
    "inverting-gradients": {
        "quick": lambda: InvertingGradients(iterations=300),
        "standard": lambda: InvertingGradients(iterations=1500),
        "paper": lambda: InvertingGradients(iterations=4800, restarts=2),
    },
}


def make_attack(name: str, effort: str = "standard") -> Attack:
    """The attack called ``name`` with the settings of ``effort``.

    Raises:
        ConfigError: Unknown name or effort, with the nearest names.
    """
    if name not in ATTACKS:
        raise ConfigError(unknown("attack", name, ATTACKS))
    if effort not in EFFORTS:
        raise ConfigError(unknown("effort", effort, EFFORTS))
    return ATTACKS[name][effort]()
