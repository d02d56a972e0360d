"""What a run tells while it goes on, and what it is in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedkl.federation.config import RunConfig
from fedkl.federation.evaluate import Accuracy


@dataclass(frozen=True)
class Event:
    """Something a caller may want to show.

    ``kind`` is ``note`` (a message), ``client`` (one client of a round is done), ``round`` (a
    round is done) or ``evaluation``.
    """

    kind: str
    round: int = 0
    rounds: int = 0
    done: int = 0
    of: int = 0
    loss: float = math.nan
    accuracy: Accuracy | None = None
    message: str = ""


@dataclass(frozen=True)
class RunResult:
    """A finished run; ``to_dict`` is ``summary.json``.

    ``pads`` has, for locks with a pad, ``renewals`` (over all clients) and ``most_presentations``
    (that any pad has served; of one key for all, those of the busiest client times the number of
    clients, which is no less than their sum); ``budgets`` has what a pad was allowed, and from
    which round on, for that may change when a run is resumed.
    """

    config: RunConfig
    seconds: float
    accuracy: Accuracy
    validation: list[dict[str, Any]]
    best: Mapping[str, Any]
    counts: Mapping[str, int]
    pads: Mapping[str, int] | None
    budgets: Sequence[Mapping[str, Any]] | None
    spec: Mapping[str, Any] | None
    origin: str
    shared: Mapping[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "method": self.config.federation.method,
            "defense": self.config.defense.name,
            "rounds": self.config.federation.rounds,
            "seconds": self.seconds,
            "accuracy": self.accuracy.to_dict(),
            "split": "test",
            "best_validation": dict(self.best),
            "counts": dict(self.counts),
            "pads": None if self.pads is None else dict(self.pads),
            "budgets": None if self.budgets is None else [dict(one) for one in self.budgets],
            "data": self.origin,
            "lock_spec": self.spec,
            "config": self.config.to_dict(),
        }
