"""Which attackers face which defense, and that the odd ones go through the whole audit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from audithelp import small_audit, small_run

from fedkl.attacks import ATTACKS, Counted, InvertingGradients, Resources
from fedkl.attacks.adaptive import Adaptive, Fishing, adaptive_for
from fedkl.audit import arsenal, run_audit
from fedkl.audit.arsenal import Arsenal, applicable, repeats
from fedkl.audit.observe import observe
from fedkl.audit.victims import Victims, draw_victims
from fedkl.federation.session import load_data
from fedkl.observation import OPEN, THREATS, Observation, threat_of
from fedkl.rng import derive

BUNDLE = load_data(small_run())


def victims(tmp_path: Path, defense: str, **settings: Any) -> Victims:
    audit = small_audit(stage="initial", defenses=(defense,), **settings)
    return Victims(audit.defended(defense, 0), tmp_path, BUNDLE, audit)


@pytest.mark.parametrize(
    "defense, names",
    [
        ("none", ["open", "crafting"]),
        ("norm", ["open", "crafting"]),
        ("noise", ["open", "crafting"]),
        ("norm+noise", ["open", "crafting"]),
        ("norm+prune", ["open", "crafting"]),
        ("pad+prune", ["key-shared", "adaptive", "crafting"]),
        ("fedbn", ["key-shared", "adaptive", "block-ignored", "crafting"]),
        # its stem is private: nothing stands before the first lock that could be ignored
        ("pad", ["key-shared", "adaptive", "crafting"]),
        ("channel", ["key-shared", "key-unknown", "key-regressed", "lock-gradient", "adaptive",
                     "block-ignored", "crafting"]),
    ],
)  # fmt: skip
def test_threats_that_make_a_difference(tmp_path: Path, defense: str, names: list[str]) -> None:
    found = applicable(tuple(THREATS), victims(tmp_path, defense))
    assert [threat.name for threat in found] == names


@pytest.mark.parametrize(
    "threat, kind",
    [("key-shared", InvertingGradients), ("adaptive", Adaptive), ("key-unknown", Adaptive),
     ("key-regressed", Adaptive), ("lock-gradient", Adaptive), ("block-ignored", Adaptive),
     ("crafting", Fishing)],
)  # fmt: skip
def test_attacker_of_each_threat(tmp_path: Path, threat: str, kind: type) -> None:
    found = victims(tmp_path, "channel")
    model = threat_of(threat)
    rows = draw_victims(BUNDLE, found.audit)[0]
    (seen,) = observe(found, [found.send(rows, lock_gradients=model.lock_gradients)], model)
    made = Arsenal(found.audit, BUNDLE, tmp_path, lambda *_: None).attack(
        "inverting-gradients", model, seen
    )
    assert type(made) is kind


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arsenal, "make_attack", lambda *_, **__: InvertingGradients(iterations=5))


@pytest.mark.usefixtures("_short")
def test_crafting_server_gets_one_image_of_a_batch(tmp_path: Path) -> None:
    audit = small_audit(
        stage="initial", threats=("crafting",), images=16, batch_size=4, defenses=("norm",)
    )
    result = run_audit(audit, tmp_path)
    fished = [row for row in result["rows"] if row["threat"] == "crafting"]
    assert fished
    assert {row["label"] for row in fished} == {arsenal.TARGET}
    assert {row["label_found"] for row in fished} == {arsenal.TARGET}
    assert {row["batch"] for row in fished} == {4}


def test_attack_that_does_not_apply_is_left_out_and_said(tmp_path: Path) -> None:
    audit = small_audit(stage="initial", attacks=("closed-form",), defenses=("norm",), images=1)
    result = run_audit(audit, tmp_path)
    assert result["rows"] == []
    assert {line["cell"].split("_")[1] for line in result["skipped"]} == {"none", "norm", "fedbn"}
    assert all("linear" in line["reason"] for line in result["skipped"])
    assert {line["threat"] for line in result["skipped"]} == {"open", "key-shared", "adaptive"}
    assert result["verdict"]["overall"] == "inconclusive"


def test_shadow_gets_public_images_and_finds_its_victims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def few(name: str, effort: str, **given: Any) -> Any:
        return Resources(public=given["public"]).shadow(120, secret_epochs=2, epochs=3, hidden=0)

    monkeypatch.setattr(arsenal, "make_attack", few)
    audit = small_audit(attacks=("shadow",), defenses=("fedbn",), images=10)
    result = run_audit(audit, tmp_path)
    assert len(result["rows"]) == 40  # none, norm, fedbn by key holder and adaptive
    holder = [row for row in result["rows"] if row["threat"] in ("open", "key-shared")]
    assert sum(row["identified"] for row in holder) > 10  # of 30; chance is 3


def test_every_attack_without_an_optimizer_counts_as_cheap() -> None:
    searching = {"dlg", "idlg", "inverting-gradients", "grnn", "ggl"}
    assert set(arsenal.FEED_FORWARD) == set(ATTACKS) - searching


def test_crafting_attackers_train_secrets_at_honest_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At crafted weights no model classifies: secrets trained there are worth nothing."""
    found = victims(tmp_path, "channel", threats=("crafting",), batch_size=4)
    made = Arsenal(found.audit, BUNDLE, tmp_path, lambda *_: None)
    at, trained = [], {"conv1.inserted_norm.keylock.gamma": torch.ones(12)}

    def train(observation: Observation, *_: object, **__: object) -> dict[str, torch.Tensor]:
        at.append(observation.model)
        return trained

    monkeypatch.setattr(arsenal, "train_secrets", train)
    honest = arsenal.probe(found)
    found.shared = made.crafted(found, honest)
    threat = threat_of("crafting")
    (seen,) = observe(found, [found.send(draw_victims(BUNDLE, found.audit)[0])], threat)
    searching = made.attack("inverting-gradients", threat, seen, honest=honest)
    assert isinstance(searching, Fishing)
    assert isinstance(searching.attack, Adaptive)
    assert searching.attack.secrets.starts == ("neutral", trained)  # type: ignore[attr-defined]
    (model,) = at
    assert model.get_parameter("fc.weight").equal(honest.model.get_parameter("fc.weight"))
    assert not model.get_parameter("fc.weight").equal(seen.model.get_parameter("fc.weight"))
    shadow = made.attack("shadow", threat, seen, honest=honest)
    assert isinstance(shadow, Fishing)
    assert shadow.attack.honest is honest  # type: ignore[attr-defined]


@pytest.mark.parametrize("defense", ["none", "channel"])
def test_labels_of_batches_are_counted_with_public_images(tmp_path: Path, defense: str) -> None:
    found = victims(tmp_path, defense, batch_size=4)
    threat = OPEN if defense == "none" else threat_of("adaptive")
    (seen,) = observe(found, [found.send(draw_victims(BUNDLE, found.audit)[0])], threat)
    made = Arsenal(found.audit, BUNDLE, tmp_path, lambda *_: None)
    attack = made.attack("inverting-gradients", threat, seen)
    assert isinstance(attack, Counted)
    assert sorted(attack.secrets) == sorted(seen.secrets)
    if defense == "channel":
        # Secrets are trained once, for the labels and for the search.
        assert attack.attack.secrets.starts == ("neutral", attack.secrets)  # type: ignore[attr-defined]
    assert not isinstance(made.attack("dlg", threat, seen), Counted)  # it searches labels
    given = replace(seen, labels=torch.zeros(1, 4, dtype=torch.int64))
    assert not isinstance(made.attack("inverting-gradients", threat, given), Counted)


@pytest.mark.parametrize(
    "threat, floor, ignore",
    [("adaptive", True, "nothing"), ("block-ignored", True, "locked-block"),
     ("key-regressed", False, "nothing")],
)  # fmt: skip
def test_adaptive_attackers_start_from_the_floor_too(
    tmp_path: Path, threat: str, floor: bool, ignore: str
) -> None:
    found = victims(tmp_path, "channel")
    model = threat_of(threat)
    (seen,) = observe(found, [found.send(draw_victims(BUNDLE, found.audit)[0])], model)
    made = Arsenal(found.audit, BUNDLE, tmp_path, lambda *_: None)
    attack = made.attack("inverting-gradients", model, seen)
    assert isinstance(attack, Adaptive)
    assert (attack.floor is not None) == floor
    assert attack.secrets.ignore == ignore
    if attack.floor is not None:
        x, y = BUNDLE.public.batch(torch.arange(len(BUNDLE.public)))
        torch.testing.assert_close(attack.floor[3], x[y == 3].mean(dim=0), atol=1e-5, rtol=0)
    without = made.attack("grnn", model, seen)  # it searches no pixels
    assert isinstance(without, Adaptive)
    assert without.floor is None


OTHERS = ("key-unknown", "key-regressed", "lock-gradient", "block-ignored")


@pytest.mark.parametrize(
    "asked, solved",
    [
        (("adaptive", *OTHERS), ["adaptive"]),
        ((*OTHERS, "adaptive"), ["adaptive"]),
        (OTHERS, ["key-unknown"]),  # nothing vanishes
        (("block-ignored",), ["block-ignored"]),
        (("lock-gradient", "crafting"), ["lock-gradient", "crafting"]),
    ],
)
def test_attack_that_needs_no_lock_weights_is_mounted_once(
    tmp_path: Path, asked: tuple[str, ...], solved: list[str]
) -> None:
    threats = applicable(asked, victims(tmp_path, "channel"))
    for attack in arsenal.FEED_FORWARD:
        once = [one.name for one in threats if not repeats(attack, one, threats)]
        assert once == ["key-shared", *solved]
    every = [one for one in threats if not repeats("inverting-gradients", one, threats)]
    assert every == list(threats)


@pytest.mark.parametrize("threat", OTHERS)
def test_attack_that_needs_no_lock_weights_finds_the_same_without(
    tmp_path: Path, threat: str
) -> None:
    found = victims(tmp_path, "channel")
    rows = draw_victims(BUNDLE, found.audit)
    images = []
    for model in (threat_of("adaptive"), threat_of(threat)):
        seen = observe(found, [found.send(r, lock_gradients=True) for r in rows], model)
        shadow = Resources(public=BUNDLE.public.batch(torch.arange(60))).shadow(
            60, secret_epochs=1, epochs=1, hidden=0
        )
        attack = adaptive_for(model, shadow, seen[0], public=BUNDLE.public.batch(torch.arange(60)))
        made = attack.reconstruct(seen, generator=derive(0, "attack"))
        images.append(torch.cat([one.images for one in made]))
    assert torch.equal(*images)


@pytest.mark.usefixtures("_short")
def test_ignoring_the_block_is_for_those_who_compare_gradients(tmp_path: Path) -> None:
    audit = small_audit(
        stage="initial",
        threats=("block-ignored", "adaptive"),
        defenses=("fedbn",),
        attacks=("inverting-gradients", "shadow"),
        images=1,
    )
    result = run_audit(audit, tmp_path)
    ignoring = [row["attack"] for row in result["rows"] if row["threat"] == "block-ignored"]
    assert ignoring == ["inverting-gradients"]
    assert result["skipped"] == []


def test_baselines_are_judged_beside_the_controls(tmp_path: Path) -> None:
    run = small_run(noise_multiplier=1e-5, prune_ratio=0.8)
    asked = ("none", "norm", "norm+noise", "norm+prune", "pad+prune")
    audit = small_audit(
        run=run, stage="initial", defenses=asked, attacks=("replay",), images=6, effort="quick"
    )
    found = run_audit(audit, tmp_path)
    roles = {(one["defense"], one["threat"]): one["role"] for one in found["summary"]}
    assert {d: t for (d, t), role in roles.items() if role == "defense"} == {
        "norm+noise": "open", "norm+prune": "open", "pad+prune": "adaptive"
    }  # fmt: skip
    assert found["verdict"]["defenses"].keys() == {"norm+noise", "norm+prune", "pad+prune"}
    rates = {(e["defense"], e["threat"]): e["identified"]["mean"] for e in found["summary"]}
    for one in (("none", "open"), ("norm", "open"), ("norm+noise", "open"), ("norm+prune", "open"),
                ("pad+prune", "key-shared")):  # fmt: skip
        assert rates[one] == 1.0, one
    assert rates["pad+prune", "adaptive"] < 1
