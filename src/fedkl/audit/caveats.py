"""What a reader of an audit has to know beside its figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from fedkl.attacks import SEARCHING
from fedkl.attacks.arrangements import MOST, too_many
from fedkl.audit.config import KEY_HOLDER, AuditConfig
from fedkl.audit.verdicts import LOCKS
from fedkl.defenses import parts_of
from fedkl.errors import number_of
from fedkl.observation import THREATS, Training

MANY: Final = 1000
"""Images under one pad of which the attack that breaks it finds about half."""
STRONGEST: Final = ("replay-relations", "replay-matched")
"""On pads: of few images under one, and of many."""


def caveats(
    audit: AuditConfig,
    accuracy: Mapping[str, Mapping[str, Any] | None],
    num_classes: int,
    skipped: Sequence[Mapping[str, Any]] = (),
    holding: Collection[str] = (),
) -> list[str]:
    """Sentences about what weakens the audit; empty if nothing does.

    Args:
        audit: Its settings.
        accuracy: Of every defense; None where nothing was trained.
        num_classes: A guesser is right once in so many times.
        skipped: Cells that could not be attacked, with ``attack``, ``defense`` and ``threat``.
        holding: Defenses whose verdict is that they hold.
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
            f"Attacks that search made {number_of(audit.iterations, 'iteration')}, as the command "
            f"asked, instead of those of effort {audit.effort!r}."
        )
    found += _in_order(audit)
    found += _not_adaptive(audit)
    found += _only_searched(audit, skipped)
    found += _outsiders_alone([d for d in _with("channel", audit) if d in holding])
    found += _one_federation(audit, holding)
    if audit.run.defense.one_key and (one := [d for d in audit.judged if _keyed(d)]):
        found.append(
            f"{', '.join(one)}: all clients hold one key (--one-key), so this is about the server "
            f"alone: a client that sees another's update reads {_as_much(audit)}."
        )
    found += _noised(_with("noise", audit))
    pads = _with("pad", audit)
    if not pads:
        return found
    return found + (_weak_against(pads, audit) or _not_mounted(pads, skipped))


def _as_much(audit: AuditConfig) -> str:
    """How much of an update another client reads that holds the same key."""
    if audit.run.federation.seal_private:
        return "as much of it as the rows holding the key: it has the private layers as well"
    return (
        "nearly as much of it as the rows holding the key, which know what that client has "
        "learned besides"
    )


def _with(part: str, audit: AuditConfig) -> list[str]:
    """The defenses that are judged and have that part."""
    return [d for d in audit.judged if part in parts_of(d)]


def _keyed(defense: str) -> bool:
    return bool({"channel", "pad"} & {*parts_of(defense)})


def _not_adaptive(audit: AuditConfig) -> list[str]:
    """That a search did not treat secrets as unknowns."""
    secret = [d for d in audit.judged if LOCKS & {*parts_of(d)} - {"norm"}]
    searches = [attack for attack in audit.attacks if attack in SEARCHING]
    if "adaptive" in audit.threats or not secret or not searches:
        return []
    return [
        f"{', '.join(secret)}: {', '.join(searches)} attacked under {', '.join(audit.threats)} and "
        "not under adaptive, the threat model that counts: an attacker who knows everything but "
        "the secrets, and searches these as well (--threats adaptive)."
    ]


def _only_searched(audit: AuditConfig, skipped: Sequence[Mapping[str, Any]]) -> list[str]:
    """Channel locks that no attacker with a client of its own has attacked."""
    learned = {a for a in audit.attacks if a.startswith(("shadow", "replay"))}
    spared = {(one["defense"], one["attack"]) for one in skipped if one["threat"] != KEY_HOLDER}
    return [
        f"{name}: no shadow and no replay attacked it, which find most behind a channel lock where "
        "searches fail (--attacks shadow-label,replay)."
        for name in _with("channel", audit)
        if all((name, attack) in spared for attack in learned)
    ]


def _in_order(audit: AuditConfig) -> list[str]:
    """That labels come with their steps, where attackers cannot try all ways to deal them out."""
    training = Training(
        batch_size=audit.batch_size, local_steps=audit.local_steps, clients=audit.aggregated
    )
    if not too_many(training, audit.observations):
        return []
    return [
        f"All attackers are granted the labels in the order of the {audit.local_steps} steps, "
        f"which no update tells: there are more than {MOST} ways to deal them out."
    ]


def _noised(names: Sequence[str]) -> list[str]:
    """What noise was not tried against."""
    if not names:
        return []
    return [
        f"{', '.join(names)}: replay weighs what it sees by the noise, of single images where "
        "nothing is private; no other attacker here does, so one that did might find more. Running "
        "statistics are sent without noise. No epsilon is claimed."
    ]


def _one_federation(audit: AuditConfig, holding: Collection[str]) -> list[str]:
    """That what holds does so in one federation."""
    if audit.seeds > 1 or not holding:
        return []
    return [
        "This is about one federation and its keys, under which all victims are: intervals over "
        "victims do not tell how much others differ (--seeds)."
    ]


def _outsiders_alone(names: Sequence[str]) -> list[str]:
    """What a channel lock that holds was not tried against."""
    if not names:
        return []
    return [
        f"{', '.join(names)}: this is about outsiders. No attacker here is another client, who has "
        "a lock of its own to the same shared layers: behind ResNet-20's channel locks, which "
        "outsiders did not open, insiders identified 92 % of single images (docs/findings.md)."
    ]


def _weak_against(pads: Sequence[str], audit: AuditConfig) -> list[str]:
    """Why this audit is not the hardest test of pads; empty if it is."""
    if audit.per_update > 1:
        return [
            f"The strongest attacks on {', '.join(pads)} that we know, {' and '.join(STRONGEST)}, "
            f"are for updates of one image; these are of {audit.per_update}."
        ]
    honest = any(not THREATS[name].crafting for name in audit.threats)
    many = audit.images * audit.observations >= MANY
    if set(STRONGEST) <= set(audit.attacks) and many and honest and audit.effort != "quick":
        return []
    return [
        f"This is not the hardest test of {', '.join(pads)}: the strongest attacks we know are "
        f"{STRONGEST[0]} on few images under one pad, and {STRONGEST[1]}, which finds half of "
        f"{MANY} (--attacks {','.join(STRONGEST)} --images {MANY} --effort standard)."
    ]


def _not_mounted(pads: Sequence[str], skipped: Sequence[Mapping[str, Any]]) -> list[str]:
    """Pads that one of the strongest attacks was asked to attack, and could not."""
    spared = {
        (one["defense"], one["attack"])
        for one in skipped
        if one["attack"] in STRONGEST and one["threat"] != KEY_HOLDER
    }
    return [
        f"One of the strongest attacks that we know, {attack}, could not be mounted on {name}: "
        "this is not the hardest test of it."
        for name in pads
        for attack in STRONGEST
        if (name, attack) in spared
    ]
