"""What clients are asked to do, and what comes of it: all that passes between engine and client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedkl.federation.client import Update
from fedkl.federation.evaluate import ClientAccuracy


@dataclass(frozen=True)
class Job:
    """One thing to do for one client.

    Attributes:
        kind: ``train`` or ``examine``.
        client: Number of the client.
        round: The round to train, or the last finished round to examine.
        split: ``validation`` or ``test``, to examine.
        keep: Rounds whose client states are still needed: the checkpoints' and the best one.
        sealed: Private layers that clients sent in the round before, by client, where they go on
            from the mean (:mod:`fedkl.federation.sealed`).
    """

    kind: str
    client: int
    round: int
    split: str = "validation"
    keep: Sequence[int] = ()
    sealed: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Result:
    """What came of a job: plain facts, and the update's tensors.

    Facts of a client that sends nothing have the reason under ``withheld``, and no tensors; those
    of one that seals its private layers have them under ``sealed``.
    """

    job: Job
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def update(self) -> Update:
        """The update of a ``train`` job."""
        return Update(
            self.job.client,
            self.job.round,
            self.facts["kind"],
            self.tensors,
            self.facts["examples"],
        )

    def accuracy(self) -> ClientAccuracy:
        """The figures of an ``examine`` job."""
        return ClientAccuracy(**{**self.facts, "wrong": tuple(self.facts["wrong"])})
