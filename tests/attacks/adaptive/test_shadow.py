"""The shadow: its decoder, its statistics, and the attack on models without and with a lock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from adaptivehelp import Victim, gradients, observe
from shadowhelp import (
    OPEN,
    digits,
    network_of,
    open_victims,
    public,
    rate,
    trained_victim,
    victims,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.attacks import Reconstruction
from fedkl.attacks.adaptive import Replay, Retrieval, Shadow, train_secrets
from fedkl.attacks.adaptive.shadow_client import Public, ShadowClient
from fedkl.attacks.adaptive.shadow_decoder import Coordinates, Decoder, ridge
from fedkl.attacks.network import Network
from fedkl.errors import AttackError, ConfigError
from fedkl.key import Key
from fedkl.locking import lock, lock_spec, shared_state
from fedkl.locking.rebuild import held_secrets, rebuild
from fedkl.metrics import class_mean_floor
from fedkl.observation import Observation, Training
from fedkl.rng import derive


def attacked(attack: Shadow, observations: list[Observation]) -> Tensor:
    found = attack.reconstruct(observations, generator=derive(0, "attack"))
    assert all(r.images.shape == (1, 1, 1, 8, 8) for r in found)
    return torch.cat([r.images[0] for r in found])


def shadow(**settings: Any) -> Shadow:
    return Shadow(*public(), **{"hidden": 0, "secret_epochs": 30, **settings})


def test_ridge_is_the_textbooks() -> None:
    generator = derive(0)
    x, w = torch.randn(500, 6, generator=generator), torch.randn(6, 3, generator=generator)
    found = ridge(x, x @ w, generator)
    torch.testing.assert_close(found, w, rtol=0.02, atol=0.02)
    noise = torch.randn(500, 3, generator=generator)
    assert float(ridge(x, noise, generator).abs().max()) < 0.2  # nothing there, nothing found


def test_coordinates_undo_the_sigmoid_and_standardize() -> None:
    generator = derive(0)
    z = torch.randn(400, 5, generator=generator) * torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0]) + 1
    labels = torch.arange(400) % 4
    coordinates = Coordinates.of(torch.sigmoid(z), labels, 4)
    assert coordinates.unfold
    x = coordinates.enter(torch.sigmoid(z))
    expected = (z - z.mean(dim=0)) / z.std(dim=0, correction=0).clamp_min(1e-8)
    torch.testing.assert_close(x[:, :4], expected[:, :4], rtol=1e-3, atol=1e-3)
    assert not x[:, 4].any()  # a constant tells nothing
    assert not Coordinates.of(z, labels, 4).unfold


def test_alignment_undoes_another_locks_scale_shift_and_sign() -> None:
    generator = derive(0)
    labels = torch.randint(4, (2000,), generator=generator)
    centers = torch.randn(4, 6, generator=generator)
    own, other = (
        centers[labels] + 0.5 * torch.randn(2000, 6, generator=generator) for _ in range(2)
    )
    scale = torch.tensor([1.0, -1.0, 3.0, -0.2, 1.0, -2.0])
    theirs = other * scale + torch.randn(6, generator=generator)
    coordinates = Coordinates.of(own, labels, 4)
    truth = coordinates.enter(other)
    errors = {
        how: float((coordinates.align(theirs, labels, how) - truth).square().mean())
        for how in (None, "global", "label")
    }
    assert errors["label"] < 0.05
    assert errors["global"] > 0.5  # right size, wrong signs
    assert errors[None] > 0.5


def test_features_are_those_of_batches_of_one() -> None:
    x, y = digits()
    victim = trained_victim()
    observation = victims("key-shared", 1)[0]
    network = Network(observation)
    client = ShadowClient(network, held_secrets(victim.locked), 10, chunk=2)
    features = client.features(x[:5])
    chunks = list(client.gradients(x[:5], y[:5]))
    for i in range(5):
        true = gradients(victim.locked, x[i : i + 1], y[i : i + 1])
        mine = {n: t[i % 2] for n, t in chunks[i // 2].items()}
        for name in network.shared:
            torch.testing.assert_close(mine[name], true[name], rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(
            features[i], true["5.weight"][0] / true["5.bias"][0], rtol=1e-3, atol=1e-4
        )


def test_features_of_a_model_that_drops_by_functions_are_those_without() -> None:
    class Forgetting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 10)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(F.dropout(self.conv(x).sigmoid().flatten(1), 0.5, self.training))
            return y

    model, x = Forgetting(), digits()[0]
    seen = Observation(
        model=model,
        kind="gradient",
        changes=({name: torch.ones_like(p) for name, p in model.named_parameters()},),
        image_shape=(1, 8, 8),
        num_classes=10,
        training=Training(),
        threat=OPEN,
    )
    features = ShadowClient(Network(seen), {}, 10).features(x[:3])
    torch.testing.assert_close(features, model.conv(x[:3]).sigmoid().flatten(1))


def test_large_networks_have_smaller_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 gradients of a ResNet-18 would be 11 GB."""
    x, y = digits()
    network = Network(victims("key-shared", 1)[0])
    size = sum(value.numel() for value in network.shared.values())
    held = held_secrets(trained_victim().locked)
    whole = list(ShadowClient(network, held, 10).gradients(x[:5], y[:5]))
    assert len(whole) == 1
    monkeypatch.setattr("fedkl.attacks.adaptive.shadow_client.NUMBERS", 2 * size + 1)
    parts = list(ShadowClient(network, held, 10).gradients(x[:5], y[:5]))
    assert [len(part["5.weight"]) for part in parts] == [2, 2, 1]
    for name in network.shared:
        joined = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(joined, whole[0][name], rtol=1e-3, atol=2e-5)
    monkeypatch.setattr("fedkl.attacks.adaptive.shadow_client.NUMBERS", 1)
    assert len(list(ShadowClient(network, held, 10).gradients(x[:3], y[:3]))) == 3


def test_own_secrets_make_the_shared_layers_classify() -> None:
    x, y = public()
    observation = victims("adaptive", 1)[0]
    network = Network(observation)
    secrets = train_secrets(observation, Public(x, y), generator=derive(0), epochs=30)
    assert secrets.keys() == network.secrets.keys()

    def right(values: Any) -> float:
        logits = network.logits({**network.shared, **values}, x)
        return float((logits.argmax(dim=1) == y).float().mean())

    assert right(secrets) > 0.8
    assert right(network.secrets) < 0.6
    before = {n: p.clone() for n, p in network.shared.items()}
    assert all(network.shared[n].equal(before[n]) for n in before)


@pytest.mark.parametrize("variant", ["features", "gradient"])
def test_key_holder_identifies_nearly_all(variant: str) -> None:
    found = attacked(shadow(variant=variant, sketch=512), victims("key-shared", 60))
    floor = class_mean_floor(*public(), digits()[1][:60])
    assert rate(found) > 0.4
    assert rate(floor) < 0.2


@pytest.mark.parametrize("variant", ["features", "gradient"])
def test_without_a_lock_nearly_all_are_identified(variant: str) -> None:
    seen = open_victims(60)
    assert train_secrets(seen[0], Public(*public()), generator=derive(0)) == {}
    found = attacked(shadow(variant=variant, sketch=512), seen)
    assert rate(found) > 0.6


def test_shadow_with_secrets_of_its_own_beats_chance() -> None:
    seen = victims("adaptive", 80)
    assert rate(attacked(shadow(), seen)) > 0.2  # chance is 0.03, and only the victim has the key
    # Eight victims a class tell their means badly, but signs and sizes well enough.
    assert rate(attacked(shadow(restandardize="label", shadows=2), seen)) > 0.2


def test_network_learns_what_the_ridge_cannot() -> None:
    generator = derive(0)
    x = torch.randn(600, 4, generator=generator)
    labels = torch.zeros(600, dtype=torch.int64)
    images = (x[:, :1] * x[:, 1:2]).tanh().mul(0.4).add(0.5).view(600, 1, 1, 1)
    errors = {}
    for hidden in (0, 64):
        coordinates = Coordinates.of(x, labels, 2)
        decoder = Decoder(coordinates, 2, hidden=hidden, epochs=40)
        decoder.fit(x[:500], labels[:500], images[:500], derive(1))
        made = decoder.decode(coordinates.enter(x[500:]), labels[500:], (1, 1, 1))
        errors[hidden] = float((made - images[500:]).square().mean())
    assert errors[64] < 0.5 * errors[0]


def test_same_generator_same_images() -> None:
    seen = victims("adaptive", 2)
    small = shadow(secret_epochs=1, hidden=8, epochs=1)
    one, two = (small.reconstruct(seen, generator=derive(1)) for _ in range(2))
    other = small.reconstruct(seen, generator=derive(2))
    assert one[0].images.equal(two[0].images)
    assert not one[0].images.equal(other[0].images)
    assert one[0].labels.equal(digits()[1][:1, None])
    assert "shadow client" in one[0].notes[0]


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    shadow(hidden=4, epochs=2, shadows=2, secret_epochs=1).reconstruct(
        victims("key-shared", 1),
        generator=derive(0),
        progress=lambda done, total, loss: told.append((done, total)),
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many gradients shadows make, from now on."""
    made: list[int] = []
    gradients = ShadowClient.gradients

    def told(self: ShadowClient, images: Tensor, labels: Tensor) -> Any:
        made.append(len(images))
        return gradients(self, images, labels)

    monkeypatch.setattr(ShadowClient, "gradients", told)
    return made


@pytest.mark.parametrize("threat", ["key-shared", "open", "adaptive"])
def test_shadows_that_are_the_victim_itself_are_made_once(
    threat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = open_victims(2) if threat == "open" else victims(threat, 2)
    small = {"variant": "gradient", "sketch": 64, "secret_epochs": 1, "hidden": 8, "epochs": 1}
    made = counted(monkeypatch)
    two = attacked(shadow(**small, shadows=2), seen)
    assert made == [600] * (2 if threat == "adaptive" else 1)
    one = attacked(shadow(**small), seen)
    assert not two.equal(one)  # the mean of two decoders, which start apart


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"variant": "pixels"}, "variant of the shadow"),
        ({"restandardize": "often"}, "restandardization"),
        ({"shadows": 0}, "shadows 0"),
        ({"hidden": -1}, "hidden -1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shadow(**settings)


def test_misfits_are_explained() -> None:
    x, y = digits()
    with pytest.raises(ConfigError, match="public images"):
        Shadow(x, y[:5])
    seen = victims("key-shared", 2)
    with pytest.raises(AttackError, match="of that shape"):
        Shadow(torch.rand(20, 3, 8, 8), y[:20]).reconstruct(seen, generator=derive(0))
    batch = replace(seen[0], training=Training(batch_size=4))
    with pytest.raises(AttackError, match="batch 4"):
        shadow().reconstruct([batch], generator=derive(0))
    with pytest.raises(AttackError, match="no observation"):
        shadow().reconstruct([], generator=derive(0))
    assert "600 images" in repr(shadow())


@pytest.mark.parametrize("kind", [Shadow, Retrieval, Replay])
@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda y: torch.where(y == 3, 10, y), r"labels from 0 to 10.*0 … 9"),
        (lambda y: torch.where(y == 3, -1, y), r"labels from -1 to 9.*0 or more"),
        (lambda y: torch.where(y == 3, -100, y), r"labels from -100"),  # which torch leaves out
        (lambda y: y.double(), r"labels of torch.float64.*integers"),
        (lambda y: y == 3, r"labels of torch.bool.*integers"),
        (lambda y: y[:, None], r"labels \(600, 1\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(
    kind: type[Shadow], wrong: Callable[[Tensor], Tensor], message: str
) -> None:
    x, y = public()
    with pytest.raises((AttackError, ConfigError), match=message):
        kind(x, wrong(y), secret_epochs=1, sketch=64).reconstruct(
            victims("adaptive", 1), generator=derive(0)
        )


def test_secrets_are_trained_on_the_models_classes_alone() -> None:
    x, y = public()
    seen = victims("adaptive", 1)[0]
    with pytest.raises(AttackError, match=r"labels from 0 to 10.*0 … 9"):
        train_secrets(seen, Public(x, y.where(y != 3, 10)), generator=derive(0))
    with pytest.raises(AttackError, match="of that shape"):
        train_secrets(seen, Public(torch.rand(20, 3, 8, 8), y[:20]), generator=derive(0))
    with pytest.raises(ConfigError, match=r"images of torch.uint8.*\[0, 1\]"):
        Public((255 * x).byte(), y)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_are_integers_of_any_size(dtype: torch.dtype) -> None:
    x, y = public()
    seen = victims("adaptive", 1)
    for kind in (Shadow, Retrieval, Replay):
        small: dict[str, Any] = {"secret_epochs": 1, "sketch": 64}
        if kind is not Replay:
            small["epochs"] = 1
        found = [
            kind(x, labels, **small).reconstruct(seen, generator=derive(0))[0]
            for labels in (y, y.to(dtype))
        ]
        assert found[0].images.equal(found[1].images)


def test_shadows_find_the_signs_that_training_has_built_on() -> None:
    """γ starts at random signs; which ones, the shared layers tell whoever has public images.

    Up to all signs of a layer at once: as σ(-z) = 1 - σ(z), turning over all γ, β of one lock and
    all γ of the next leaves the network (and its gradient) as it was, but for the border.
    """
    x, y = public()
    true = held_secrets(trained_victim().locked)
    observation = victims("adaptive", 1)[0]
    shares = []
    for seed in range(3):
        own = train_secrets(observation, Public(x, y), generator=derive(seed), epochs=30)
        right = [own[n].sign() == true[n].sign() for n in true if n.endswith("gamma")]
        shares += [max(float(r.float().mean()), 1 - float(r.float().mean())) for r in right]
    assert sum(shares) / len(shares) > 0.8  # eight random signs give 0.64


@pytest.mark.parametrize("how", ["global", "label"])
def test_too_few_victims_are_not_restandardized_and_a_note_says_so(how: str) -> None:
    """One victim of twenty that cannot be treated does not take the others with it."""
    seen = victims("adaptive", 19)
    plain = shadow(hidden=0, secret_epochs=1).reconstruct(seen, generator=derive(0, "a"))
    few = shadow(hidden=0, secret_epochs=1, restandardize=how)
    found = few.reconstruct(seen, generator=derive(0, "a"))
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one.images, other.images)
        assert any("19 updates, too few" in note for note in one.notes)
    assert not any("too few" in note for note in plain[0].notes)


def test_too_few_victims_for_their_classes_is_said() -> None:
    found = Shadow(*public(), hidden=0, secret_epochs=1, restandardize="label")
    few = found.reconstruct(victims("adaptive", 20), generator=derive(0, "a"))
    assert any("as by 'global'" in note for note in few[0].notes)
    many = found.reconstruct(victims("adaptive", 80), generator=derive(0, "a"))
    assert not any("as by 'global'" in note for note in many[0].notes)


def test_one_class_with_enough_victims_is_restandardized_beside_others_with_none() -> None:
    attack, observation = shadow(restandardize="label"), victims("adaptive", 1)[0]
    labels = torch.tensor([1] * 10 + [3] * 10)
    assert len(attack._notes(observation, labels, "features")) == 1
    assert "as by 'global'" in attack._notes(observation, torch.arange(20) % 10, "features")[1]


@pytest.mark.parametrize("entry, unfold", [(0.9, True), (1.0, False), (1.5, False), (0.0, False)])
def test_inputs_are_unfolded_where_all_of_them_lie_between_0_and_1(
    entry: float, unfold: bool
) -> None:
    inputs = torch.tensor([[0.2, 0.4], [0.6, entry]])
    coordinates = Coordinates.of(inputs, torch.tensor([0, 1]), 2)
    assert coordinates.unfold is unfold
    assert bool(coordinates.enter(inputs).isfinite().all())


def test_where_the_classifier_is_private_the_gradient_is_decoded() -> None:
    x, y = digits()
    locked = lock(network_of("model"), Key.generate(), scheme="pad", stem=False, example=x[:4])
    public = rebuild(network_of("outsider"), lock_spec(locked))
    own = dict(public.state_dict())
    with torch.no_grad():
        for name, tensor in shared_state(locked).items():
            own[name].copy_(tensor)
    victim = Victim(locked, public, (1, 8, 8))
    assert "5.weight" in lock_spec(locked).private

    def found(variant: str, *, labels: bool) -> list[Reconstruction]:
        each = [(x[i : i + 1], y[i : i + 1]) for i in range(4)]
        seen = [observe(victim, "key-shared", [one], labels=labels) for one in each]
        attack = shadow(variant=variant, sketch=128)
        return attack.reconstruct(seen, generator=derive(0, "attack"))

    both = found("features", labels=True), found("gradient", labels=True)
    for one, other in zip(*both, strict=True):
        assert torch.equal(one.images, other.images)
        assert "shadow on gradient with the victim's secrets" in one.notes[0]
    with pytest.raises(AttackError, match="grant the labels"):
        found("features", labels=False)


def test_victims_of_one_class_tell_no_rotation() -> None:
    x, y = digits()
    same = (y == 3).nonzero().flatten()[:20]
    victim = trained_victim()
    seen = [observe(victim, "adaptive", [(x[i : i + 1], y[i : i + 1])]) for i in same]
    attack = shadow(secret_epochs=1, restandardize="transport")
    found = attack.reconstruct(seen, generator=derive(0))
    assert "restandardized: global" in found[0].notes[0]
    assert "one class" in found[0].notes[1]
    plain = shadow(secret_epochs=1, restandardize="global").reconstruct(seen, generator=derive(0))
    assert all(a.images.equal(b.images) for a, b in zip(found, plain, strict=True))
