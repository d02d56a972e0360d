"""What a setting needs to have any effect. One that has none is an error: nothing is silent."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fedkl.federation import RunConfig


@dataclass(frozen=True)
class Need:
    """A condition on the rest of a configuration.

    Attributes:
        said: What is needed, as it is written on the command line.
        path: The setting that decides it.
        holds: Whether a configuration has it.
        filed: Whether it is asked of what a file says, too. Files are shared between runs.
    """

    said: str
    path: str
    holds: Callable[[RunConfig], bool]
    filed: bool = True


def _defense(*names: str) -> Need:
    def holds(config: RunConfig) -> bool:
        return bool(set(names) & set(re.split(r"\s*\+\s*", config.defense.name)))

    return Need(f"--defense {' or '.join(names)}", "defense.name", holds)


def _renewing(config: RunConfig) -> bool:
    return config.renewal.every > 0 or config.renewal.on_spent == "renew"


CHANNEL: Final = _defense("channel")
PAD: Final = _defense("pad")
PADS: Final = _defense("pad", "open-pad")
KEYED: Final = _defense("channel", "pad")
PRIVATE: Final = _defense("fedbn", "channel", "pad", "open-pad")
NORMED: Final = _defense("norm", "fedbn", "channel", "pad", "open-pad")
NOISE: Final = _defense("noise")
PRUNE: Final = _defense("prune")
# Figures that only keys and private tensors give rise to.
EXAMINED_KEYS: Final = replace(KEYED, filed=False)
EXAMINED: Final = replace(PRIVATE, filed=False)
LEARNING: Final = Need(
    "a lock of which something is --learned",
    "defense.learned",
    lambda c: not PAD.holds(c) or c.defense.learned != "none",
    filed=False,
)
INNER: Final = Need(
    "locks behind the first, by --layers or --lock-head-input",
    "defense.layers",
    lambda c: c.defense.layers != "first" or bool(c.defense.lock_head_input),
    filed=False,
)
GROUPED: Final = Need(
    "a lock that is not the paper's", "defense.preset", lambda c: c.defense.preset is None
)
SPREAD: Final = Need(
    "a lock that starts by --spread",
    "defense.preset",
    lambda c: c.defense.preset is None or c.defense.spread is not None,
)
ONE: Final = Need("--one-key", "defense.one_key", lambda c: c.defense.one_key)
TOGETHER: Final = Need(
    "--method fedavg or fedsgd", "federation.method", lambda c: c.federation.method != "centralized"
)
STEPPING: Final = Need(
    "--method fedavg or centralized", "federation.method", lambda c: c.federation.method != "fedsgd"
)
PASSES: Final = Need(
    "runs without --local-steps", "training.local_steps", lambda c: c.training.local_steps is None
)
DIRICHLET: Final = Need(
    "--partition dirichlet", "data.partition", lambda c: c.data.partition == "dirichlet"
)
SHARDS: Final = Need("--partition shards", "data.partition", lambda c: c.data.partition == "shards")
SGD: Final = Need("--optimizer sgd", "training.optimizer", lambda c: c.training.optimizer == "sgd")
MOMENTUM: Final = Need(
    "--optimizer sgd or rmsprop",
    "training.optimizer",
    lambda c: c.training.optimizer in ("sgd", "rmsprop"),
)
STEP: Final = Need("--schedule step", "training.schedule", lambda c: c.training.schedule == "step")
CALENDAR: Final = Need("--renew-every 1 or more", "renewal.every", lambda c: c.renewal.every > 0)
RENEWING: Final = Need("--renew-every or --on-spent renew", "renewal.every", _renewing)
