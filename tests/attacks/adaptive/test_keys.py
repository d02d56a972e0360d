"""Attackers with the lock's weights: the key guessed, searched, or read off a gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from adaptivehelp import Victim, fixed_key, images, locked_lenet, observe

from fedkl.attacks import InvertingGradients
from fedkl.attacks.adaptive import (
    ATTACKERS,
    Adaptive,
    AdaptiveSecrets,
    FreeAffines,
    GuessedKey,
    LockGradientKey,
    RegressedKey,
    adaptive_for,
    read_key,
)
from fedkl.attacks.adaptive.unknowns import spec_of
from fedkl.attacks.closed_form import ClosedForm
from fedkl.attacks.network import Network
from fedkl.errors import AttackError, ConfigError
from fedkl.locking.rebuild import held_secrets
from fedkl.observation import THREATS, Observation
from fedkl.rng import derive


def small(law: str = "sign", **settings: Any) -> Victim:
    return locked_lenet(fixed_key(1, law=law), side=16, law=law, **settings)


def of(victim: Victim, threat: str, count: int = 1) -> Observation:
    x, y = images(count)
    x = x[..., 8:24, 8:24]
    return observe(victim, threat, [(x[i : i + 1], y[i : i + 1]) for i in range(count)])


@pytest.fixture(scope="module")
def victim() -> Victim:
    return small()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("chain", [False, True])
def test_every_sign_of_the_key_is_read_off_the_lock_gradient(chain: bool, count: int) -> None:
    victim = small(chain=chain)
    true = fixed_key(1).vector(1024)
    found = read_key(of(victim, "lock-gradient", count))
    assert found.equal(true) or found.equal(-true)


def test_a_bias_tells_the_sign_too() -> None:
    victim = small(bias=True, activation="tanh")
    assert read_key(of(victim, "lock-gradient")).equal(fixed_key(1).vector(1024))


@pytest.mark.parametrize("law, tolerance", [("uniform", 0.01), ("normal", 0.1)])
def test_other_laws_give_the_scale(law: str, tolerance: float) -> None:
    found = read_key(of(small(law), "lock-gradient"))
    true = fixed_key(1, law=law).vector(1024, law)
    aligned = found * (found @ true).sign()
    assert float((aligned - true).abs().max()) < tolerance
    if law == "uniform":
        assert aligned.equal(found)


def test_lock_gradient_gives_gamma_and_beta_of_the_client(victim: Victim) -> None:
    observation = of(victim, "lock-gradient")
    network = Network(observation)
    true = held_secrets(victim.locked)
    variants = LockGradientKey(spec_of(observation)).variants(observation, derive(0))
    assert len(variants) == 2  # without a bias the key's sign is left to the loss
    errors = [
        max(float((s.given(observation, network)[n] - true[n]).abs().max()) for n in true)
        for s in variants
    ]
    assert min(errors) < 1e-4


def test_lock_gradient_attack_is_the_key_holders(victim: Victim) -> None:
    attack = InvertingGradients(iterations=40)
    seen, held = of(victim, "lock-gradient"), of(victim, "key-shared")
    mounted = adaptive_for(THREATS["lock-gradient"], attack, seen)
    (found,) = mounted.reconstruct([seen], generator=derive(0))
    (control,) = attack.reconstruct([held], generator=derive(0))
    assert found.loss < 3 * control.loss
    guess = adaptive_for(THREATS["key-unknown"], attack, seen)
    (guessed,) = guess.reconstruct([of(victim, "key-unknown")], generator=derive(0))
    assert guessed.loss > 3 * found.loss


def test_a_guessed_key_stays_as_it_was_guessed(victim: Victim) -> None:
    observation = of(victim, "key-unknown")
    secrets = GuessedKey(spec_of(observation))
    start = secrets.start([observation], [0, 0], derive(0))
    keys = start["secret:key"]
    assert keys.abs().eq(1).all()
    assert not keys[0].equal(keys[1])
    network = Network(observation)
    given = secrets.given(observation, network)

    def total(key: torch.Tensor) -> torch.Tensor:
        values = secrets.values({"secret:key": key}, given, network)
        return torch.stack([v.sum() for v in values.values()]).sum()

    assert not torch.func.grad(total)(keys[0]).any()


def test_key_regression_moves_gamma_and_beta_and_lowers_the_loss(victim: Victim) -> None:
    observation = of(victim, "key-regressed")
    attack = InvertingGradients(iterations=40)
    regressed = adaptive_for(THREATS["key-regressed"], attack, observation)
    assert isinstance(regressed, Adaptive)
    assert isinstance(regressed.secrets, RegressedKey)
    (found,) = regressed.reconstruct([observation], generator=derive(0))
    guessed = Adaptive(attack, GuessedKey(spec_of(observation)))
    (fixed,) = guessed.reconstruct([observation], generator=derive(0))
    assert found.loss < 0.7 * fixed.loss


def test_key_vector_is_found_from_gamma_and_beta_alone() -> None:
    """The image known, the key is 1024 unknowns against the gradient's thousands of equations."""
    victim = small()
    observation = of(victim, "key-regressed")
    network = Network(observation)
    secrets = RegressedKey(spec_of(observation))
    given = secrets.given(observation, network)
    x, y = images(1)
    x, label = x[..., 8:24, 8:24], torch.eye(10)[y]

    def loss(key: torch.Tensor) -> torch.Tensor:
        made = network.change(secrets.values({"secret:key": key}, given, network), x, label)
        pairs = [(made[n], observation.changes[0][n]) for n in made]
        return torch.stack([(a - b).square().sum() for a, b in pairs]).sum()

    true = fixed_key(1).vector(1024) / secrets.rate
    assert float(loss(true)) < 1e-9  # the unknown is scaled as values() undoes it
    assert float(loss(-true)) > 1e-4


@pytest.mark.parametrize(
    "threat, expected",
    [
        ("key-unknown", GuessedKey),
        ("key-regressed", RegressedKey),
        ("lock-gradient", LockGradientKey),
        ("adaptive", FreeAffines),
        ("crafting", FreeAffines),
    ],
)
def test_attackers_of_every_threat(
    victim: Victim, threat: str, expected: type[AdaptiveSecrets]
) -> None:
    attack = InvertingGradients(iterations=1)
    observation = of(victim, threat)
    mounted = adaptive_for(THREATS[threat], attack, observation)
    assert isinstance(mounted, Adaptive)
    assert type(mounted.secrets) is expected
    (found,) = mounted.reconstruct([observation], generator=derive(0))
    assert torch.isfinite(found.images).all()
    own = replace(THREATS[threat], name="of my own")
    again = adaptive_for(own, attack, observation)
    assert isinstance(again, Adaptive)
    assert type(again.secrets) is expected


def test_who_needs_no_secrets_gets_none(victim: Victim) -> None:
    attack = InvertingGradients(iterations=1)
    observation = of(victim, "key-shared")
    assert adaptive_for(THREATS["key-shared"], attack, observation) is attack
    plain = replace(observation, secrets=(), spec=None)
    assert adaptive_for(THREATS["adaptive"], attack, plain) is attack
    other = ClosedForm()
    assert adaptive_for(THREATS["adaptive"], other, observation) is other
    keyless = of(locked_lenet(None, side=16, scheme="fedbn"), "adaptive")
    mounted = adaptive_for(THREATS["adaptive"], attack, keyless)
    assert isinstance(mounted, Adaptive)
    assert type(mounted.secrets) is FreeAffines
    assert adaptive_for(THREATS["key-unknown"], attack, keyless) is attack


def test_every_preset_has_attackers() -> None:
    assert THREATS.keys() <= ATTACKERS.keys()


def test_what_was_not_granted_is_named(victim: Victim) -> None:
    nothing = of(victim, "adaptive")
    spec = spec_of(nothing)
    attack = InvertingGradients(iterations=1)
    with pytest.raises(AttackError, match="was not granted"):
        Adaptive(attack, GuessedKey(spec)).reconstruct([nothing], generator=derive(0))
    with pytest.raises(AttackError, match="were not sent"):
        Adaptive(attack, LockGradientKey(spec)).reconstruct([nothing], generator=derive(0))
    dead = of(victim, "lock-gradient")
    zeros = tuple({n: g * 0 for n, g in sent.items()} for sent in dead.lock_gradients)
    with pytest.raises(AttackError, match="is zero"):
        read_key(replace(dead, lock_gradients=zeros))
    keyless = of(locked_lenet(None, side=16, scheme="fedbn"), "adaptive")
    with pytest.raises(AttackError, match="no map from a key"):
        GuessedKey(spec_of(keyless))
    with pytest.raises(ConfigError, match="rate -1"):
        RegressedKey(spec, rate=-1)
    with pytest.raises(ConfigError, match="sign 2"):
        LockGradientKey(spec, sign=2)
