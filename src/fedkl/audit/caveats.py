"""What a reader of an audit has to know beside its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedkl.audit.config import AuditConfig


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
    if own is not None and own < 2 / num_classes:
        found.append(
            f"The undefended control is nearly untrained: its accuracy is {own:.1%}, chance is "
            f"{1 / num_classes:.1%}. Attacks on it are attacks on random weights, so compare with "
            "the ordinary norm instead, or train it longer or at another learning rate."
        )
    if audit.iterations is not None:
        found.append(
            f"Attacks that search made {audit.iterations} iterations, as the command asked, "
            f"instead of those of effort {audit.effort!r}."
        )
    return found
