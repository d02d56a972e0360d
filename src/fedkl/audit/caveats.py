"""What a reader of an audit has to know beside its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fedkl.audit.config import AuditConfig

ENOUGH: Final = 64
"""Images under one pad from which on the attack that breaks it finds more than a guesser."""
STRONGEST: Final = "retrieval-transport"


def caveats(
    audit: AuditConfig, accuracy: Mapping[str, Mapping[str, Any] | None], num_classes: int
) -> list[str]:
    """Sentences about what weakens the audit; empty if nothing does.

    Args:
        audit: Its settings.
        accuracy: Of every defense; None where nothing was trained.
        num_classes: A guesser is right once in so many times.
    """
    found = []
    own = (accuracy.get("none") or {}).get("own_key")
    chance = 1 / num_classes
    # Twice chance, but with two classes that is 1: at most half of the way from chance to 1.
    if own is not None and own < min(2 * chance, (1 + chance) / 2):
        found.append(
            f"The undefended control is nearly untrained: its accuracy is {own:.1%}, chance is "
            f"{chance:.1%}. Attacks on it are attacks on random weights, so compare with "
            "the ordinary norm instead, or train it longer or at another learning rate."
        )
    if audit.iterations is not None:
        found.append(
            f"Attacks that search made {audit.iterations} iterations, as the command asked, "
            f"instead of those of effort {audit.effort!r}."
        )
    if pads := [d for d in audit.judged if "pad" in map(str.strip, d.split("+"))]:
        found += _weak_against_pads(audit, pads[0])
    return found


def _weak_against_pads(audit: AuditConfig, pad: str) -> list[str]:
    """Why this audit is not the hardest test of a pad; empty if it is."""
    if audit.per_update > 1:
        return []  # nobody has an attack for that yet, and the controls say so
    if STRONGEST in audit.attacks and audit.images * audit.observations >= ENOUGH:
        return []
    return [
        f"The strongest attack on {pad} that we know is not among these at full strength: "
        f"{STRONGEST} on {ENOUGH} images or more under one pad (--attacks {STRONGEST} --images "
        f"{ENOUGH})."
    ]
