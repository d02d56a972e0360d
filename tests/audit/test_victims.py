"""Victims send what the federation's clients send, and nothing private comes along."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from audithelp import small_audit, small_run
from torch.nn.functional import cross_entropy, one_hot

from fedkl.attacks.network import Network
from fedkl.audit.caveats import caveats
from fedkl.audit.observe import observe
from fedkl.audit.victims import Victims, draw_victims
from fedkl.errors import ConfigError, DataError
from fedkl.federation.session import load_data
from fedkl.locking import affines
from fedkl.observation import OPEN, threat_of
from fedkl.pruning import kept_count
from fedkl.rng import borrowed, derive

BUNDLE = load_data(small_run())


def victims(tmp_path: Path, defense: str, **settings: object) -> Victims:
    audit = small_audit(stage="initial", **settings)
    return Victims(audit.defended(defense, 0), tmp_path, BUNDLE, audit)


@pytest.mark.parametrize("defense", ["none", "norm", "fedbn", "channel"])
def test_gradient_is_the_locked_models(tmp_path: Path, defense: str) -> None:
    found = victims(tmp_path, defense)
    rows = torch.tensor([[5]])
    sent = found.send(rows)
    found.workspace.enter(found.shared, found.key, found.private)
    model = found.workspace.model.train()
    model.zero_grad()
    x, y = BUNDLE.test.batch(rows[0])
    cross_entropy(model(x), y).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if n in found.shared}
    assert expected.keys() == sent.changes[0].keys()
    for name, value in expected.items():
        torch.testing.assert_close(sent.changes[0][name], value)


@pytest.mark.parametrize("defense", ["none", "norm", "fedbn", "channel"])
@pytest.mark.parametrize("steps", [1, 3])
def test_key_holder_can_repeat_the_update(tmp_path: Path, defense: str, steps: int) -> None:
    """The rebuilt model with the true secrets makes the very update from the true images."""
    found = victims(tmp_path, defense, local_steps=steps, batch_size=2)
    rows = torch.arange(2 * steps)[None]
    sent = found.send(rows)
    threat = OPEN if defense in ("none", "norm") else threat_of("key-shared")
    (seen,) = observe(found, [sent], threat)
    network = Network(seen)
    x, y = BUNDLE.test.batch(rows[0])
    secrets = {n: seen.known.get(n, v) for n, v in network.secrets.items()}
    # A client goes through its images in an order of its own.
    made = network.change(secrets, x, one_hot(y, 10).float())
    if steps == 1:
        for name, value in made.items():
            torch.testing.assert_close(value, seen.changes[0][name], rtol=1e-3, atol=1e-5)
    else:
        flat = torch.cat([v.flatten() for v in made.values()])
        true = torch.cat([seen.changes[0][n].flatten() for n in made])
        assert float(torch.cosine_similarity(flat, true, dim=0)) > 0.9


LOCKS = {
    "fedbn": {},
    "channel": {},
    "channel bias": {"bias": True},
    "channel sigmoid": {"activation": "sigmoid"},
    "channel relu": {"activation": "relu", "bias": True},
    "pad": {},
    "pad channel": {"learned": "channel", "gain": 2.0},
    "pad none": {"learned": "none"},
}


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("lock", LOCKS)
def test_key_holder_repeats_several_steps_to_rounding(
    tmp_path: Path, lock: str, decay: bool
) -> None:
    """γ and β move at the rate of what they are computed from, not at that of an affine.

    And if updates are sent at one length, they are repeated at that.
    """
    defense = lock.partition(" ")[0]
    run = small_run(name=defense, **LOCKS[lock])
    training = dataclasses.replace(
        run.training,
        lr=0.1,
        momentum=0.9 if decay else 0.0,
        nesterov=decay,
        weight_decay=0.01 if decay else 0.0,
        update_length=0.2 if decay else None,
    )
    run = dataclasses.replace(run, training=training)
    audit = small_audit(run=run, stage="initial", local_steps=3, batch_size=4)
    found = Victims(audit.defended(defense, 0), tmp_path, BUNDLE, audit)
    rows = torch.arange(12)[None]
    (seen,) = observe(found, [found.send(rows)], threat_of("key-shared"))
    network = Network(seen)
    generator = derive(found.config.seed, "victim", 0, 0)
    with borrowed(generator):  # the client's own order
        x, y = BUNDLE.test.batch(torch.cat(list(found.workspace.batches(rows[0], generator))))
    secrets = {n: seen.known[n] for n in network.secrets}
    made = network.change(secrets, x, one_hot(y, 10).float())
    miss = sum(float((made[n] - seen.changes[0][n]).square().sum()) for n in made)
    size = sum(float(seen.changes[0][n].square().sum()) for n in made)
    assert (miss / size) ** 0.5 < 1e-4
    assert (size**0.5 == pytest.approx(0.2, rel=1e-3)) == decay


@pytest.mark.parametrize("aggregated", [1, 2])
def test_a_gradient_of_one_length_can_be_repeated(tmp_path: Path, aggregated: int) -> None:
    """Each client's at the length, their mean shorter; labels of batches are granted."""
    run = small_run(name="norm")
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, update_length=0.2))
    audit = small_audit(run=run, stage="initial", batch_size=2, aggregated=aggregated)
    found = Victims(audit.defended("norm", 0), tmp_path, BUNDLE, audit)
    rows = torch.arange(2 * aggregated)[None]
    (seen,) = observe(found, [found.send(rows)], OPEN)
    assert seen.labels is not None
    network = Network(seen)
    x, y = BUNDLE.test.batch(rows[0])
    made = network.change(network.secrets, x, one_hot(y, 10).float())
    for name, value in made.items():
        torch.testing.assert_close(value, seen.changes[0][name], rtol=1e-3, atol=1e-5)
    size = torch.cat([v.flatten() for v in seen.changes[0].values()]).norm()
    assert (float(size) == pytest.approx(0.2, rel=1e-4)) == (aggregated == 1)


PRUNED = {"prune_ratio": 0.8, "clip": 0.05, "noise_multiplier": 0.0}


@pytest.mark.parametrize("steps, aggregated", [(1, 1), (1, 2), (3, 1)])
@pytest.mark.parametrize("defense", ["none+prune", "norm+prune+noise", "pad+noise+prune"])
def test_the_key_holder_repeats_what_was_pruned_and_clipped(
    tmp_path: Path, defense: str, steps: int, aggregated: int
) -> None:
    run = small_run(**PRUNED)
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, update_length=0.2))
    audit = small_audit(run=run, stage="initial", local_steps=steps, aggregated=aggregated)
    found = Victims(audit.defended(defense, 0), tmp_path, BUNDLE, audit)
    rows = torch.arange(steps * aggregated)[None]
    (seen,) = observe(found, [found.send(rows)], threat_of("key-shared"))
    network = Network(seen)
    generator = derive(found.config.seed, "victim", 0, 0)
    x, y = BUNDLE.test.batch(rows[0])
    if aggregated == 1:
        with borrowed(generator):  # the client's own order
            x, y = BUNDLE.test.batch(torch.cat([*found.workspace.batches(rows[0], generator)]))
    secrets = {n: seen.known.get(n, v) for n, v in network.secrets.items()}
    made = network.change(secrets, x, one_hot(y, 10).float())
    size = sum(float(value.square().sum()) for value in seen.changes[0].values())
    miss = sum(float((made[n] - seen.changes[0][n]).square().sum()) for n in made)
    assert (miss / size) ** 0.5 < 1e-3
    for value in seen.changes[0].values():
        assert int((value != 0).sum()) <= aggregated * kept_count(value.numel(), 0.8)
    if "noise" in defense and aggregated == 1:
        # noise+prune clips first, and pruning shortens more.
        assert (size**0.5 == pytest.approx(0.05, rel=1e-3)) == (defense == "norm+prune+noise")
        assert size**0.5 < 0.0501


def test_noise_is_on_every_entry_of_parameters_and_other_for_every_victim(tmp_path: Path) -> None:
    run = small_run(clip=1e6, noise_multiplier=1e-8)
    audit = small_audit(run=run, stage="initial")
    plain = Victims(audit.defended("norm", 0), tmp_path / "a", BUNDLE, audit)
    noised = Victims(audit.defended("norm+noise", 0), tmp_path / "b", BUNDLE, audit)
    drawn = []
    for rows in torch.tensor([[[0]], [[1]]]):
        (one,), (two,) = plain.send(rows).changes, noised.send(rows).changes
        drawn.append(torch.cat([(two[n] - one[n]).flatten() for n in one]))
        (one,), (two,) = plain.send(rows).statistics, noised.send(rows).statistics
        assert one
        assert all(torch.equal(one[n], two[n]) for n in one)
    for noise in drawn:
        assert float(noise.std()) == pytest.approx(0.01, rel=0.05)
        assert bool((noise != 0).all())
    assert abs(float(torch.corrcoef(torch.stack(drawn))[0, 1])) < 0.05
    (seen,) = observe(noised, [noised.send(torch.tensor([[0]]))], OPEN)
    assert (seen.training.clip, seen.training.noise) == (1e6, pytest.approx(0.01))
    assert seen.labels is not None  # which noise may have hidden


@pytest.mark.parametrize("defense", ["none", "fedbn", "channel", "pad"])
def test_aggregate_is_the_mean_and_its_key_holder_can_repeat_it(
    tmp_path: Path, defense: str
) -> None:
    """Two clients, each with a lock of its own; the server sees their mean alone."""
    found = victims(tmp_path, defense, aggregated=2, batch_size=2)
    rows = torch.arange(4)[None]
    (mean,) = found.send(rows).changes
    parts = [found._update(client, rows[0, 2 * client :][:2], 0) for client in (0, 1)]
    for name, value in mean.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2)
    threat = OPEN if defense == "none" else threat_of("key-shared")
    (seen,) = observe(found, [found.send(rows)], threat)
    network = Network(seen)
    x, y = BUNDLE.test.batch(rows[0])
    secrets = {n: seen.known.get(n, v) for n, v in network.secrets.items()}
    made = network.change(secrets, x, one_hot(y, 10).float())
    for name, value in made.items():
        torch.testing.assert_close(value, mean[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("defense", ["none", "pad"])
@pytest.mark.parametrize("linear", [True, False])
def test_labels_are_granted_where_no_shared_linear_layer_tells_them(
    tmp_path: Path, defense: str, linear: bool
) -> None:
    """Else nobody of those who need them could attack: not even the control."""
    run = small_run()
    name = run.model.name if linear else "audithelp:all_convolutional"
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, name=name))
    found = victims(tmp_path, defense, run=run)
    (seen,) = observe(found, [found.send(torch.tensor([[3]]))], threat_of("adaptive"))
    assert (seen.labels is None) == (linear and defense == "none")


def test_granted_labels_of_an_aggregate_do_not_tell_whose_they_are(tmp_path: Path) -> None:
    """The classifier of a pad is private, so labels are granted: which, not of which client."""
    for rows in (torch.tensor([[3, 1]]), torch.tensor([[1, 3]])):
        found = victims(tmp_path, "pad", aggregated=2)
        (seen,) = observe(found, [found.send(rows)], threat_of("key-shared"))
        assert seen.labels is not None
        true = BUNDLE.test.labels[rows]
        assert len(true.unique()) == 2
        assert torch.equal(seen.labels, true.sort(dim=1).values)


@pytest.mark.parametrize("steps, ordered", [(2, False), (4, False), (5, True)])
def test_all_rows_of_an_audit_know_the_same_of_the_steps(
    tmp_path: Path, steps: int, ordered: bool
) -> None:
    """Who counts labels cannot know their steps, so whoever is granted them must not either.

    Where there are more ways than are tried, both are told.
    """
    rows = torch.tensor([[3, 1, 8, 6, 4][:steps]])
    true = BUNDLE.test.labels[rows]
    assert not torch.equal(true, true.sort(dim=1).values)
    for defense in ("none", "pad"):
        found = victims(tmp_path / defense, defense, local_steps=steps)
        (seen,) = observe(found, [found.send(rows)], threat_of("adaptive"))
        assert seen.ordered == ordered
        assert (seen.labels is None) == (defense == "none" and not ordered)
        if seen.labels is not None:
            wanted = true if ordered else true.sort(dim=1).values
            assert torch.equal(seen.labels, wanted)
    said = caveats(found.audit, {}, 10)
    assert any("in the order of the" in line for line in said) == ordered


@pytest.mark.parametrize(
    "defense, shared",
    [("none", None), ("norm", True), ("channel", False), ("channel", True), ("pad", False)],
)
def test_statistics_that_cross_the_wire_are_in_the_observation(
    tmp_path: Path, defense: str, shared: bool | None
) -> None:
    run = small_run(name=defense, share_statistics=bool(shared) and defense != "norm")
    audit = small_audit(run=run, stage="initial")
    found = Victims(audit.defended(defense, 0), tmp_path, BUNDLE, audit)
    threat = OPEN if defense in ("none", "norm") else threat_of("adaptive")
    (seen,) = observe(found, [found.send(torch.tensor([[0]]))], threat)
    network = Network(seen)
    assert bool(network.statistics.rates) == bool(shared)
    if defense == "norm":
        x, y = BUNDLE.test.batch(torch.tensor([0]))
        made = network.sent({}, x, one_hot(y, 10).float())[1]
        for name, value in network.statistics.observed(seen.statistics[0]).items():
            torch.testing.assert_close(made[name], value, rtol=1e-3, atol=1e-4)


def test_more_clients_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="aggregated is 3"):
        victims(tmp_path, "none", aggregated=3)


@pytest.mark.parametrize("defense", ["fedbn", "channel"])
@pytest.mark.parametrize("threat", ["adaptive", "key-shared"])
def test_secrets_are_granted_or_neutral(tmp_path: Path, defense: str, threat: str) -> None:
    found = victims(tmp_path, defense)
    (seen,) = observe(found, [found.send(torch.tensor([[0]]))], threat_of(threat))
    parameters = dict(seen.model.named_parameters())
    assert seen.secrets
    for name in seen.secrets:
        neutral = 1.0 if name.endswith("gamma") else 0.0
        assert bool((parameters[name] == neutral).all())
    assert (set(seen.known) == set(seen.secrets)) == (threat == "key-shared")
    assert bool(seen.known) == (threat == "key-shared")


def test_no_private_byte_in_an_adaptive_observation(tmp_path: Path) -> None:
    """Every tensor of the observation, against every private tensor of the client."""
    found = victims(tmp_path, "channel")
    found.workspace.enter(found.shared, found.key, found.private)
    private = [t.clone() for pair in affines(found.workspace.model).values() for t in pair]
    private += [p.detach().clone() for p in found.workspace.private_parameters]

    def contains(observation: object) -> bool:
        public = [
            *seen.model.state_dict().values(),
            *seen.changes[0].values(),
            *seen.known.values(),
        ]
        blob = b"|".join(t.contiguous().numpy().tobytes() for t in public)
        return any(t.numpy().tobytes() in blob for t in private)

    sent = found.send(torch.tensor([[0]]))
    (seen,) = observe(found, [sent], threat_of("adaptive"))
    assert not contains(seen)
    (seen,) = observe(found, [sent], threat_of("key-shared"))
    assert contains(seen)  # planted, so the search can find


def test_victims_go_through_the_classes(tmp_path: Path) -> None:
    rows = draw_victims(BUNDLE, small_audit(images=20))
    labels = BUNDLE.test.labels[rows.flatten()]
    assert torch.bincount(labels, minlength=10).tolist() == [2] * 10
    assert len(rows.unique()) == 20
    again = draw_victims(BUNDLE, small_audit(images=20, seeds=2))
    assert torch.equal(rows, again)


@pytest.mark.parametrize(
    "settings, advice",
    [
        (
            {"images": 360},
            "takes 360 test images, but digits has 359; give --images 359 or fewer.",
        ),
        ({"images": 90, "batch_size": 4}, "--images 89 or fewer, or for updates of fewer images"),
        ({"images": 2, "observations": 200}, "--images 1 or fewer, or for"),
        ({"images": 1, "batch_size": 400}, "has 359; give updates of fewer images."),
    ],
)
def test_no_image_is_two_victims(settings: dict[str, int], advice: str) -> None:
    """Repeated, they would count as independent, and make intervals too narrow."""
    with pytest.raises(DataError, match=advice):
        draw_victims(BUNDLE, small_audit(**settings))


def test_every_image_of_the_test_set_may_be_a_victim() -> None:
    for settings in ({"images": 359}, {"images": 89, "batch_size": 4}):
        rows = draw_victims(BUNDLE, small_audit(**settings))
        assert len(rows.unique()) == rows.numel()


def test_victims_are_images_as_they_are_on_the_cpu(tmp_path: Path) -> None:
    """Whatever the federation was trained on and with."""
    audit = small_audit(stage="initial")
    plain = audit.defended("none", 0)
    other = dataclasses.replace(
        plain, device="cuda", data=dataclasses.replace(plain.data, augment=True)
    )
    one, two = (
        Victims(config, tmp_path, BUNDLE, audit).send(torch.tensor([[5]])).changes[0]
        for config in (plain, other)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_lock_gradients_are_not_in_the_repr(tmp_path: Path) -> None:
    sent = victims(tmp_path, "channel").send(torch.tensor([[0]]), lock_gradients=True)
    assert sent.lock_gradients[0]
    assert "keylock" not in repr(sent)
