"""Which attackers belong to which threat, and what they are given to work with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from fedkl.attacks import Attack, make_attack
from fedkl.audit.config import KEY_HOLDER, AuditConfig
from fedkl.audit.victims import Victims
from fedkl.data import DataBundle
from fedkl.observation import OPEN, Observation, ThreatModel, threat_of

FEED_FORWARD: Final = ("shadow", "shadow-gradient", "closed-form")
_NEED_A_KEY: Final = ("key-unknown", "key-regressed", "lock-gradient")


def applicable(names: Sequence[str], victims: Victims) -> tuple[ThreatModel, ...]:
    """The threat models that make a difference for these victims, the key holder first.

    Without secrets there is but one: the server knows everything. A keyless lock has no key to
    be guessed.
    """
    spec = victims.spec
    if spec is None or spec.scheme == "norm":
        crafting = [threat_of(n) for n in names if threat_of(n).crafting]
        return (OPEN, *crafting)
    found = [threat_of(KEY_HOLDER)]
    for name in dict.fromkeys(names):
        if name == KEY_HOLDER or (name in _NEED_A_KEY and spec.scheme != "channel"):
            continue
        found.append(threat_of(name))
    return tuple(found)


class Arsenal:
    """Makes attacks for observations.

    Args:
        audit: Effort and seeds.
        bundle: Public images, which attackers may train on.
        folder: Where what they trained is kept.
        tell: Called with events.
    """

    def __init__(
        self, audit: AuditConfig, bundle: DataBundle, folder: Path, tell: Callable[[Any], None]
    ) -> None:
        self.audit, self.bundle, self.folder, self.tell = audit, bundle, folder, tell

    def attack(self, name: str, threat: ThreatModel, observation: Observation) -> Attack:
        """The attack called ``name`` as an attacker under ``threat`` mounts it."""
        return make_attack(name, self.audit.effort)

    def crafted(self, victims: Victims) -> dict[str, Tensor]:
        """The global state that a crafting server sends in place of the honest one."""
        raise NotImplementedError
