"""What is said beside the figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from audithelp import small_audit

from fedkl.audit import AuditConfig
from fedkl.audit.caveats import caveats as all_caveats

SEARCHED = "no shadow and no replay attacked it"
BARE = "not under adaptive"
ONE = "about one federation and its keys"


def caveats(*given: Any, **settings: Any) -> list[str]:
    """What is said, but for what depends on attacks, threats and seeds alone."""
    mine = (SEARCHED, BARE, ONE)
    said = all_caveats(*given, **settings)
    return [one for one in said if not any(words in one for words in mine)]


@pytest.mark.parametrize(
    "own, classes, said",
    [(0.11, 10, True), (0.199, 10, True), (0.21, 10, False), (0.015, 100, True), (0.9, 10, False),
     (0.74, 2, True), (0.76, 2, False), (0.99, 2, False), (0.66, 3, True), (0.67, 3, False)],
)  # fmt: skip
def test_untrained_control_is_called_so(own: float, classes: int, said: bool) -> None:
    accuracy = {"none": {"own_key": own}, "channel": {"own_key": 0.05}}
    found = caveats(small_audit(), accuracy, classes)
    assert len(found) == said
    if said:
        assert f"{own:.1%}" in found[0]
        assert "nearly untrained" in found[0]


@pytest.mark.parametrize("accuracy", [{}, {"none": None}, {"none": {"own_key": None}}])
def test_nothing_is_said_of_what_was_not_trained(accuracy: dict[str, None]) -> None:
    assert caveats(small_audit(), accuracy, 10) == []


def test_noise_is_said_to_be_weighed_by_one_attacker_alone() -> None:
    audit = small_audit(defenses=("norm+noise", "noise", "norm+prune"))
    (said,) = caveats(audit, {}, 10)
    assert said.startswith("norm+noise, noise: replay weighs")
    assert "No epsilon is claimed" in said
    (pad,) = caveats(small_audit(defenses=("pad+prune",)), {}, 10)
    assert "hardest test of pad+prune" in pad


HARD = {
    "attacks": ("dlg", "replay-matched", "replay-relations"),
    "images": 1000,
    "effort": "standard",
}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"defenses": ("channel", "pad")}, "hardest test of pad:"),
        ({"defenses": ("pad",), **HARD}, ""),
        ({"defenses": ("pad",), **HARD, "images": 250, "observations": 4}, ""),
        ({"defenses": ("pad",), **HARD, "images": 999}, "hardest"),
        ({"defenses": ("pad",), **HARD, "effort": "quick"}, "--effort standard"),
        ({"defenses": ("pad",), **HARD, "attacks": ("retrieval-transport",)}, "--images 1000"),
        ({"defenses": ("pad",), **HARD, "attacks": ("replay-matched",)}, "replay-relations on few"),
        ({"defenses": ("pad",), **HARD, "attacks": ("replay-relations",)}, "half of 1000"),
        ({"defenses": ("pad",), **HARD, "threats": ("crafting",)}, "hardest"),
        ({"defenses": ("pad",), "batch_size": 8}, "these are of 8"),
        ({"defenses": ("channel",)}, ""),
    ],
)
def test_a_pad_that_was_not_tested_the_hardest_way_is_said_so(
    settings: dict[str, Any], words: str
) -> None:
    found = caveats(small_audit(**settings), {}, 10)
    assert len(found) == bool(words)
    assert words in "".join(found)


@pytest.mark.parametrize(
    "attack, threat, said",
    [("replay-matched", "adaptive", True), ("replay-matched", "key-shared", False),
     ("replay-relations", "adaptive", True),
     ("dlg", "adaptive", False)],
)  # fmt: skip
def test_hardest_test_that_could_not_be_mounted_is_none(
    attack: str, threat: str, said: bool
) -> None:
    """Of a classifier that is no linear layer, say: asked for is not done."""
    audit = small_audit(defenses=("pad",), **HARD)
    skipped = [{"attack": attack, "defense": "pad", "threat": threat, "reason": "no"}]
    skipped.append({"attack": attack, "defense": "none", "threat": "open", "reason": "no"})
    found = caveats(audit, {}, 10, skipped)
    assert len(found) == said
    assert all("could not be mounted on pad" in line for line in found)


def test_other_iterations_than_those_of_the_effort_are_told() -> None:
    (line,) = caveats(small_audit(iterations=5), {}, 10)
    assert "5 iterations" in line
    assert "'quick'" in line
    assert "5 iterations" in small_audit(iterations=5).cost
    assert "iterations" not in small_audit().cost


@pytest.mark.parametrize("defense, said", [("pad", 1), ("channel", 1), ("fedbn", 0)])
def test_one_key_for_all_is_against_the_server_alone(defense: str, said: int) -> None:
    audit = small_audit(defenses=("none", defense), **HARD)
    own = caveats(audit, {}, 10)
    lock = replace(audit.run.defense, name="pad", one_key=True)
    one = caveats(replace(audit, run=replace(audit.run, defense=lock)), {}, 10)
    assert len(one) - len(own) == said
    assert f"{defense}: all clients hold one key" * said in "".join(one)
    assert ("which know what that client has learned besides" in "".join(one)) == bool(said)
    sealing = replace(audit.run.federation, seal_private=True)
    sealed = caveats(
        replace(audit, run=replace(audit.run, defense=lock, federation=sealing)), {}, 10
    )
    assert ("it has the private layers as well" in "".join(sealed)) == bool(said)
    assert "learned besides" not in "".join(sealed)


@pytest.mark.parametrize(
    "defenses, holding, said",
    [
        (("channel",), ("channel",), "channel: this is about outsiders"),
        (("channel", "pad"), ("channel", "pad"), "channel: this is about outsiders"),
        (("channel",), (), ""),  # a leak needs no insider
        (("fedbn",), ("fedbn",), ""),
    ],
)
def test_a_channel_lock_that_holds_does_so_against_outsiders(
    defenses: tuple[str, ...], holding: tuple[str, ...], said: str
) -> None:
    found = caveats(small_audit(defenses=defenses, **HARD), {}, 10, holding=holding)
    assert len(found) == bool(said)
    assert said in "".join(found)


@pytest.mark.parametrize(
    "defenses, attacks, skipped, said",
    [
        (("channel",), ("dlg",), (), True),
        (("channel+noise",), ("dlg", "retrieval"), (), True),
        (("channel",), ("dlg", "shadow-label"), (), False),
        (("channel",), ("replay-relations",), (), False),
        (("channel",), ("dlg", "replay"), ("replay",), True),  # it could not be mounted
        (("pad", "none"), ("dlg",), (), False),
    ],
)
def test_a_channel_lock_that_was_only_searched_is_said_so(
    defenses: tuple[str, ...], attacks: tuple[str, ...], skipped: tuple[str, ...], said: bool
) -> None:
    audit = small_audit(defenses=defenses, attacks=attacks)
    left = [{"defense": defenses[0], "attack": a, "threat": "adaptive"} for a in skipped]
    left += [{"defense": defenses[0], "attack": a, "threat": "key-shared"} for a in attacks]
    found = [one for one in all_caveats(audit, {}, 10, left) if SEARCHED in one]
    assert len(found) == said
    assert all(one.startswith(defenses[0]) for one in found)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"threats": ("key-unknown",)}, True),
        ({"threats": ("crafting", "block-ignored"), "defenses": ("none", "pad+prune")}, True),
        ({"threats": ("key-unknown", "adaptive")}, False),
        ({"threats": ("key-unknown",), "attacks": ("replay",)}, False),  # one to it
        ({"threats": ("key-unknown",), "defenses": ("norm", "none")}, False),  # no secrets
    ],
)
def test_searches_that_were_not_adaptive_are_said_so(settings: dict[str, Any], said: bool) -> None:
    audit: AuditConfig = small_audit(**settings)
    assert sum(BARE in one for one in all_caveats(audit, {}, 10)) == said


@pytest.mark.parametrize(
    "seeds, holding, said", [(1, ("pad",), True), (1, (), False), (3, ("pad",), False)]
)
def test_what_holds_in_one_federation_is_said_to_be_about_that(
    seeds: int, holding: tuple[str, ...], said: bool
) -> None:
    audit = small_audit(defenses=("pad",), seeds=seeds)
    assert sum(ONE in one for one in all_caveats(audit, {}, 10, holding=holding)) == said
