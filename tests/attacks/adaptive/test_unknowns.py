"""The attacker who knows the lock spec and frees γ and β."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from adaptivehelp import Victim, fixed_key, images, locked_lenet, observe

from fedkl.attacks import DLG, InvertingGradients
from fedkl.attacks.adaptive import Adaptive, FreeAffines, FreeSecrets, adaptive_for
from fedkl.attacks.adaptive.laws import draw_affines, key_affines
from fedkl.attacks.adaptive.unknowns import spec_of
from fedkl.attacks.network import Network
from fedkl.attacks.search import Trials
from fedkl.errors import AttackError, ConfigError
from fedkl.key import Key
from fedkl.locking import private_state
from fedkl.locking.rebuild import held_secrets
from fedkl.metrics import ssim
from fedkl.observation import THREATS, Observation, Training
from fedkl.rng import derive


def quick(**settings: Any) -> InvertingGradients:
    return InvertingGradients(**{"iterations": 3, **settings})


@pytest.fixture(scope="module")
def victim() -> Victim:
    """All three convolutions locked, γ and β in (0, 1) as in the paper's leakage tests."""
    return locked_lenet(fixed_key(law="uniform"), scheme="paper-sigmoid")


@pytest.fixture(scope="module")
def small() -> Victim:
    return locked_lenet(fixed_key(), side=16)


def of(small: Victim, threat: str = "adaptive", count: int = 1) -> list[Observation]:
    x, y = images(count)
    x = x[..., 8:24, 8:24]
    return [observe(small, threat, [(x[i : i + 1], y[i : i + 1])]) for i in range(count)]


@pytest.mark.slow
def test_freeing_gamma_and_beta_is_about_as_good_as_the_key(victim: Victim) -> None:
    x, y = images(2)
    attack = InvertingGradients(iterations=250)
    found = {}
    for name, threat in (("holder", "key-shared"), ("free", "adaptive"), ("neutral", "adaptive")):
        seen = [observe(victim, threat, [(x[i : i + 1], y[i : i + 1])]) for i in range(2)]
        mounted = Adaptive(attack, FreeAffines()) if name == "free" else attack
        result = mounted.reconstruct(seen, generator=derive(0, "attack"))
        found[name] = float(ssim(torch.cat([r.images[0] for r in result]), x).mean())
    assert found["holder"] > 0.35
    assert found["free"] > 0.7 * found["holder"]
    assert found["neutral"] < 0.5 * found["free"]  # it is the freedom that does it


def test_true_secrets_explain_the_update_exactly(small: Victim) -> None:
    """The rebuilt model with the true γ and β computes what the locked client computed."""
    (observation,) = of(small, "key-shared")
    network = Network(observation)
    x, y = images(1)
    made = network.change(held_secrets(small.locked), x[..., 8:24, 8:24], torch.eye(10)[y])
    for name, seen in observation.changes[0].items():
        torch.testing.assert_close(made[name], seen, rtol=1e-3, atol=1e-6)


def test_unknowns_move_and_are_one_set_per_trial(small: Victim) -> None:
    observations = of(small, count=2)
    secrets = FreeAffines(rate=0.25)
    start = secrets.start(observations, [0, 0, 1], derive(0))
    assert len(start) == 6  # γ and β of three locks, not one set per update
    assert {value.shape for value in start.values()} == {(3, 12)}
    network = Network(observations[0])
    values = secrets.values(
        {n: t[0] for n, t in start.items()}, secrets.given(observations[0], network), network
    )
    for name, neutral in network.secrets.items():
        assert values[name].equal(neutral), name  # the rate does not show in the value


def test_starts_of_the_law_differ_per_trial_and_have_its_spread(small: Victim) -> None:
    (observation,) = of(small)
    secrets = FreeAffines(start="law", rate=1.0)
    start = secrets.start([observation], [0] * 200, derive(0))
    gammas = torch.cat([t for n, t in start.items() if n.endswith("gamma")])
    betas = torch.cat([t for n, t in start.items() if n.endswith("beta")])
    assert abs(float(gammas.std()) - 1.0) < 0.1  # spread 1, shift_spread 0.3: the defaults
    assert abs(float(betas.std()) - 0.3) < 0.03
    assert not start["secret:conv1.inserted_norm.keylock.gamma"][0].equal(
        start["secret:conv1.inserted_norm.keylock.gamma"][1]
    )


def test_given_starts_are_taken(small: Victim) -> None:
    (observation,) = of(small)
    name = "conv1.inserted_norm.keylock.gamma"
    secrets = FreeAffines(start={name: torch.full((12,), -2.0)}, rate=0.5)
    start = secrets.start([observation], [0, 0], derive(0))
    assert start[f"secret:{name}"].equal(torch.full((2, 12), -4.0))
    assert start["secret:conv2.inserted_norm.keylock.gamma"].equal(torch.full((2, 12), 2.0))
    assert "given (1 tensor)" in repr(secrets)


@pytest.mark.parametrize(
    "settings",
    [{}, {"activation": "relu", "bias": True}, {"chain": True}, {"scheme": "paper-sigmoid"}],
    ids=str,
)
def test_key_affines_are_the_locks(settings: dict[str, Any]) -> None:
    law = "uniform" if "scheme" in settings else "sign"
    key = fixed_key(3, law=law)
    victim = locked_lenet(key, side=16, **settings)
    (observation,) = of(victim)
    made = key_affines(spec_of(observation), private_state(victim.locked), key.vector(1024, law))
    true = held_secrets(victim.locked)
    assert made.keys() == true.keys()
    for name in true:
        torch.testing.assert_close(made[name], true[name].detach(), rtol=1e-4, atol=1e-5)


def test_a_pad_is_freed_with_its_stem() -> None:
    victim = locked_lenet(Key.generate(), side=16, scheme="pad", head=False)
    (observation,) = of(victim)
    assert "conv1.weight" in observation.secrets
    drawn = draw_affines(spec_of(observation), derive(0))
    gamma = drawn["conv1.inserted_norm.keylock.gamma"]
    assert gamma.shape == (12, 8, 8)
    assert 0.4 < float((gamma < 0).float().mean()) < 0.6
    attack = adaptive_for(THREATS["adaptive"], quick(), observation)
    assert isinstance(attack, Adaptive)
    assert isinstance(attack.secrets, FreeSecrets)
    start = attack.secrets.start([observation], [0, 0], derive(0))
    assert start.keys() == {f"secret:{name}" for name in observation.secrets}
    (found,) = attack.reconstruct([observation], generator=derive(0))
    assert torch.isfinite(found.images).all()


def test_pooled_observations_share_their_secrets(small: Victim) -> None:
    x, y = images(3)
    x = x[..., 8:24, 8:24]
    pooled = observe(small, "adaptive", [(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    (found,) = Adaptive(quick(), FreeAffines()).reconstruct([pooled], generator=derive(0))
    assert found.images.shape == (3, 1, 1, 16, 16)
    assert found.labels.equal(y[:, None])


def test_works_on_unrolled_updates(small: Victim) -> None:
    (observation,) = of(small)
    training = Training(batch_size=1, local_steps=2, lr=0.1, repeats=True)
    network = Network(replace(observation, kind="update", training=training))
    x, y = images(1)
    x, label = x[..., 8:24, 8:24], torch.eye(10)[y]
    secrets = held_secrets(small.locked)
    update = {n: t.detach() for n, t in network.change(secrets, x, label).items()}
    observation = replace(observation, kind="update", training=training, changes=(update,))
    attack = Adaptive(quick(iterations=40), FreeAffines())
    (found,) = attack.reconstruct([observation], generator=derive(0))
    assert found.losses[-1] < 0.7 * found.losses[0]


def test_locked_block_is_left_out(small: Victim) -> None:
    (observation,) = of(small)
    network = Network(observation)
    secrets = FreeAffines(ignore="locked-block")
    assert secrets.ignored(observation, network) == {"conv1.weight", "conv1.bias"}
    assert FreeAffines().ignored(observation, network) == frozenset()
    changed = dict(observation.changes[0])
    changed["conv1.weight"] = changed["conv1.weight"] + 1  # nobody looks
    (one,) = Adaptive(quick(), secrets).reconstruct([observation], generator=derive(0))
    other = replace(observation, changes=(changed,))
    (two,) = Adaptive(quick(), secrets).reconstruct([other], generator=derive(0))
    assert one.images.equal(two.images)
    assert one.loss == two.loss


class _Lost:
    """All starts of its own are no numbers, so that the one from the floor is the best."""

    def start(self, trials: Trials, generator: torch.Generator) -> dict[str, torch.Tensor]:
        unknowns: dict[str, torch.Tensor] = super().start(trials, generator)  # type: ignore[misc]
        return {**unknowns, "images": unknowns["images"] * torch.nan}


class LostInverting(_Lost, InvertingGradients):
    pass


class LostDLG(_Lost, DLG):
    pass


def test_one_restart_more_starts_from_the_floor_of_its_label(small: Victim) -> None:
    observations = of(small, count=2)
    floor = torch.rand(10, 1, 16, 16, generator=derive(0, "floor"))
    attack = Adaptive(LostInverting(iterations=1), FreeAffines(), floor=floor)
    found = attack.reconstruct(observations, generator=derive(0))
    _, y = images(2)
    for i in range(2):  # one iteration: the best unknowns are those it started from
        assert found[i].images[0, 0].equal(floor[y[i]])
    searching = Adaptive(LostDLG(iterations=1), FreeAffines(), floor=floor)
    (mixed,) = searching.reconstruct(observations[:1], generator=derive(0))
    torch.testing.assert_close(mixed.images[0, 0], floor.mean(dim=0))


def test_the_loss_chooses_between_the_floor_and_the_rest(small: Victim) -> None:
    """Once the floor is the better start, once it is not."""
    observations, y = of(small), images(1)[1]
    many = InvertingGradients(iterations=1, restarts=6, tv=0.0)
    true = FreeAffines(start=held_secrets(small.locked))  # with these the image explains all
    plain = Adaptive(many, true).reconstruct(observations, generator=derive(0))[0]
    x = images(1)[0][..., 8:24, 8:24]
    for floor, wins in ((x, True), (1 - x, False)):
        every = floor.expand(10, 1, 16, 16)
        (found,) = Adaptive(many, true, floor=every).reconstruct(observations, generator=derive(0))
        assert found.images[0, 0].equal(every[y[0]]) == wins
        assert (found.loss < plain.loss) == wins


def test_images_of_one_class_start_apart(small: Victim) -> None:
    x, _ = images(2)
    y = torch.tensor([3, 3])
    seen = observe(small, "adaptive", [(x[..., 8:24, 8:24], y)], labels=True)
    floor = torch.full((10, 1, 16, 16), 0.5)
    attack = Adaptive(LostInverting(iterations=1), FreeAffines(), floor=floor)
    (found,) = attack.reconstruct([seen], generator=derive(0))
    assert not found.images[0, 0].equal(found.images[0, 1])
    assert float((found.images - 0.5).abs().max()) < 0.15


def test_same_generator_same_images(small: Victim) -> None:
    attack = Adaptive(quick(), FreeAffines(start="law"))
    (one,) = attack.reconstruct(of(small), generator=derive(5))
    (two,) = attack.reconstruct(of(small), generator=derive(5))
    (other,) = attack.reconstruct(of(small), generator=derive(6))
    assert one.images.equal(two.images)
    assert not one.images.equal(other.images)


def test_shadow_start_is_tried_beside_the_neutral_one(small: Victim) -> None:
    observations = of(small)
    x, y = images(40, start=100)
    public = (x[..., 8:24, 8:24], y)
    attack = adaptive_for(THREATS["adaptive"], quick(), observations[0], public=public)
    assert isinstance(attack, Adaptive)
    neutral, trained = attack.secrets.variants(observations[0], derive(0))
    assert isinstance(neutral, FreeAffines)
    assert isinstance(trained, FreeAffines)
    assert neutral.begin == "neutral"
    assert not isinstance(trained.begin, str)
    assert trained.begin.keys() == set(observations[0].secrets)
    told: list[tuple[int, int]] = []
    (found,) = attack.reconstruct(
        observations, generator=derive(0), progress=lambda a, b, _: told.append((a, b))
    )
    assert told[-1] == (6, 6)  # three iterations from either start
    (alone,) = Adaptive(quick(), FreeAffines()).reconstruct(observations, generator=derive(0))
    assert found.loss <= alone.loss * 1.5
    given = {name: torch.ones(12) for name in observations[0].secrets}
    started = adaptive_for(THREATS["crafting"], quick(), observations[0], start=given)
    assert isinstance(started, Adaptive)
    assert len(started.secrets.variants(observations[0], derive(0))) == 1
    unfit = adaptive_for(THREATS["crafting"], quick(), observations[0], public=public)
    assert isinstance(unfit, Adaptive)  # crafted weights train nobody
    assert len(unfit.secrets.variants(observations[0], derive(0))) == 1


def test_tells_what_it_is(small: Victim) -> None:
    attack = Adaptive(quick(), FreeAffines(start="law"), floor=torch.zeros(10, 1, 16, 16))
    assert attack.name == "inverting-gradients+affine"
    assert "start='law'" in repr(attack)
    assert "floor=(10, 1, 16, 16)" in repr(attack)
    (found,) = attack.reconstruct(of(small), generator=derive(0))
    assert "γ and β" in found.notes[-1]


def test_progress_covers_everything(small: Victim) -> None:
    told: list[tuple[int, int]] = []
    Adaptive(quick(), FreeAffines()).reconstruct(
        of(small), generator=derive(0), progress=lambda done, of_, _: told.append((done, of_))
    )
    assert told[-1] == (3, 3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FreeAffines(start="warm"), "start of the secrets"),
        (lambda: FreeAffines(start="shadow"), "public images"),
        (lambda: FreeAffines(rate=0), "rate 0"),
        (lambda: FreeAffines(ignore="everything"), "gradients to ignore"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_misfits_are_explained(small: Victim) -> None:
    (observation,) = of(small)
    (open_,) = of(locked_lenet(None, side=16, scheme="norm"))
    with pytest.raises(AttackError, match="nothing to free"):
        Adaptive(quick(), FreeAffines()).reconstruct([open_], generator=derive(0))
    with pytest.raises(AttackError, match="one image per class"):
        Adaptive(quick(), FreeAffines(), floor=torch.zeros(3, 1, 16, 16)).reconstruct(
            [observation], generator=derive(0)
        )
    with pytest.raises(AttackError, match="lock spec"):
        Adaptive(quick(), FreeAffines(start="law")).reconstruct(
            [replace(observation, spec=None)], generator=derive(0)
        )


def test_clients_of_an_aggregate_have_secrets_each(small: Victim) -> None:
    (first,) = of(small)
    both = replace(first, training=Training(clients=2))
    secrets = FreeAffines(start="law")
    start = secrets.start([both], [0], derive(0, "a"))
    for name, value in start.items():
        one = dict(both.model.named_parameters())[name.removeprefix("secret:")]
        assert value.shape == (1, 2, *one.shape)
    assert any(not torch.equal(value[0, 0], value[0, 1]) for value in start.values())
    attack = Adaptive(InvertingGradients(iterations=2, labels="search"), secrets)
    (found,) = attack.reconstruct([both], generator=derive(0, "a"))
    assert found.images.shape[:2] == (1, 2)
