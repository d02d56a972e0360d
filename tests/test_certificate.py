"""Directions and bits where they can be counted by hand, or computed the naive way."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from certhelp import CLASSES, Affine, certified, classified, observed, pictures
from fedkl.certificate import Certificate, Prior, certify, prior_of
from fedkl.certificate.algebra import Information, Leftover, compressed
from fedkl.certificate.certify import check_size
from fedkl.certificate.jacobians import Presented
from fedkl.errors import AttackError, ConfigError
from fedkl.key import Key
from fedkl.locking import lock, lock_spec
from fedkl.locking.rebuild import held_secrets
from fedkl.observation import Training
from fedkl.rng import borrowed, derive

SHAPE = (1, 3, 3)
PAD = ("0.beta", "0.gamma")


# ------------------------------------------------------------------------ counted by hand


def test_a_linear_layer_gives_every_direction_away() -> None:
    (found,) = certified(classified([], 9), 1, SHAPE)
    assert (found.directions, found.known, found.of, found.secrets) == (9, 9, 9, 0)
    assert found.bits == pytest.approx(found.bits_known)
    assert found.spectrum[0] == pytest.approx(1)


@given(side=st.integers(1, 4), updates=st.integers(1, 5))
def test_a_shift_per_position_hides_one_image_and_no_difference(side: int, updates: int) -> None:
    shape, n = (1, side, side), side * side
    model = classified([Affine(shape, scale=False)], n)
    for t, found in enumerate(certified(model, updates, shape, ("0.beta",)), start=1):
        assert (found.directions, found.known, found.of) == (n * (t - 1), n * t, n * t)


@given(side=st.integers(1, 4), updates=st.integers(1, 5))
def test_a_scale_and_shift_per_position_hide_two_images(side: int, updates: int) -> None:
    """Two unknowns a position against one equation a presentation: the third image pays."""
    shape, n = (1, side, side), side * side
    model = classified([Affine(shape, scale=True)], n)
    for t, found in enumerate(certified(model, updates, shape, PAD), start=1):
        assert (found.directions, found.known) == (n * max(0, t - 2), n * t)
        # Secrets hide no more directions than they are; here, not one less.
        assert found.directions >= found.known - found.secrets


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_norm_removes_mean_and_scale(channels: int) -> None:
    norm = nn.BatchNorm2d(channels, affine=False, eps=1e-14)
    (found,) = certified(classified([norm], 16 * channels), 1, (channels, 4, 4))
    assert (found.directions, found.of) == (14 * channels, 16 * channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_secret_scale_and_shift_a_channel_hide_nothing_behind_a_norm(channels: int) -> None:
    """Mean and scale are lost with or without them: what they could hide is not there."""
    norm = nn.BatchNorm2d(channels, eps=1e-14)
    model = classified([norm], 16 * channels)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels))
        norm.bias.copy_(torch.randn(channels))
    secrets = ("0.weight", "0.bias")
    (found,) = certified(model, 1, (channels, 4, 4), secrets)
    assert (found.directions, found.known, found.secrets) == (
        14 * channels,
        14 * channels,
        2 * channels,
    )


def told(momentum: float | None, *, sent: bool = True) -> Certificate:
    """One image behind a norm whose statistics are shared and a secret shift per position."""
    x, y = pictures(1, SHAPE)
    norm = nn.BatchNorm2d(1, affine=False, momentum=momentum)
    model = classified([norm, Affine(SHAPE, scale=False)], 9)
    before, seen = copy.deepcopy(model), observed(model, x, y, ("1.beta",))
    statistics = ({n: b.clone() for n, b in model.named_buffers()},) if sent else ()
    seen = dataclasses.replace(seen, model=before, statistics=statistics)
    held = {"1.beta": dict(model.named_parameters())["1.beta"].detach()}
    (found,) = certify(seen, x, y, held, prior=Prior(0.3, 0.01, {"1.beta": 1.0}))
    return found


def test_shared_statistics_give_mean_and_variance_away() -> None:
    assert (told(0.1, sent=False).directions, told(0.1).directions) == (0, 2)
    assert told(0.1).values == told(0.1, sent=False).values + 2


def test_shared_statistics_that_cannot_be_derived_are_refused() -> None:
    assert told(None, sent=False).directions == 0
    with pytest.raises(AttackError, match=r"0\.running_mean is sent and was changed by update 0"):
        told(None)


def test_a_private_layer_is_an_unknown_like_any_other() -> None:
    """Of z = W x all is seen, and for any x some W gives it."""
    model = classified([nn.Flatten(), nn.Linear(9, 9, bias=False)], 9)
    first, second = certified(model, 2, SHAPE, ("1.weight",))
    assert (first.directions, first.known) == (0, 9)
    assert (second.directions, second.known) == (0, 18)


@pytest.mark.parametrize("sure", [0.0, 14.0, 18.0])
@pytest.mark.parametrize("which", [0, 2])
def test_a_small_update_gives_away_as_much_as_a_large_one(sure: float, which: int) -> None:
    """Of an image that the model is sure of the gradient is a millionth of the others'."""
    x, y = pictures(3, SHAPE)
    model = classified([Affine(SHAPE, scale=True)], 9)
    with torch.no_grad():
        seen = model[0](x[:, 0]).flatten(1)
        rest = torch.linalg.qr(seen[[i for i in range(3) if i != which]].T).Q
        own = seen[which] - rest @ (rest.T @ seen[which])
        model[2].weight.mul_(0.05)[y[which, 0]] += sure * own / (own @ own)
        model[2].bias.zero_()
    held = {name: value.detach() for name, value in model.named_parameters() if name in PAD}
    observation = observed(model, x, y, PAD)
    sizes = [max(float(g.abs().max()) for g in c.values()) for c in observation.changes]
    assert (sizes[which] < 1e-4 * max(sizes)) == (sure > 0)
    prior = Prior(0.3, 0.01, dict.fromkeys(PAD, 1.0))
    found = certify(observation, x, y, held, prior=prior)
    assert [(one.directions, one.known) for one in found] == [(0, 9), (0, 18), (9, 27)]


def test_an_update_of_zero_beside_others_gives_nothing_away() -> None:
    x, y = pictures(2, SHAPE)
    model = classified([], 9)
    first, second = x.flatten(1)
    way = 1e4 * (second - first) / (second - first).square().sum()
    with torch.no_grad():
        model[1].weight.zero_()[y[1, 0]] = way
        model[1].bias.zero_()[y[1, 0]] = -way @ first
    found = certify(observed(model, x, y), x, y, {}, prior=Prior(0.3, 0.01, {}))
    assert [(one.directions, one.of) for one in found] == [(9, 9), (9, 18)]


def test_presentations_count_batches() -> None:
    model = classified([Affine(SHAPE, scale=False)], 9)
    first, second = certified(model, 2, SHAPE, ("0.beta",), batch=2)
    assert (first.updates, first.presentations, first.of) == (1, 2, 18)
    assert (second.updates, second.presentations, second.of) == (2, 4, 36)
    assert first.directions <= 9  # one shift for both: at most the difference is seen
    assert second.directions > 18


# ------------------------------------------------------------------------ the naive way


def matrices(updates: int, secrets: int, inputs: int, rank: int) -> tuple[list[Tensor], ...]:
    """J_s of that rank and J_x per update."""
    generator = derive(0, "matrices", updates, secrets, inputs, rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = normal(rank, secrets)
    return (
        [normal(12, rank) @ base for _ in range(updates)],
        [normal(12, inputs) for _ in range(updates)],
    )


SIZES = given(
    updates=st.integers(1, 4),
    secrets=st.integers(1, 15),
    inputs=st.integers(1, 6),
    rank=st.integers(0, 6),
    squeeze=st.booleans(),
)


@SIZES
def test_leftover_is_the_projection(
    updates: int, secrets: int, inputs: int, rank: int, squeeze: bool
) -> None:
    by_secrets, by_inputs = matrices(updates, secrets, inputs, rank)
    growing = Leftover(secrets, 1e-8)
    for s, x in zip(by_secrets, by_inputs, strict=True):
        growing.add(*(compressed(s, x) if squeeze else (s, x)))
    stacked, blocks = torch.cat(by_secrets), torch.block_diag(*by_inputs)
    left, size, _ = torch.linalg.svd(stacked, full_matrices=True)
    free = left[:, int((size > 1e-9).sum()) :]
    expected = torch.zeros(blocks.shape[1], dtype=torch.float64)
    values = torch.linalg.svdvals(free.T @ blocks)
    expected[: len(values)] = values
    torch.testing.assert_close(growing.spectrum(), expected, atol=1e-6, rtol=1e-6)


@SIZES
def test_bits_are_the_determinant_of_the_definition(
    updates: int, secrets: int, inputs: int, rank: int, squeeze: bool
) -> None:
    by_secrets, by_inputs = matrices(updates, secrets, inputs, rank)
    growing = Information(secrets, 0.3)
    for s, x in zip(by_secrets, by_inputs, strict=True):
        growing.add(*(compressed(s, x) if squeeze else (s, x)))
    s, x = torch.cat(by_secrets), torch.block_diag(*by_inputs)
    eye = torch.eye(len(s), dtype=torch.float64)

    def definition(hidden: Tensor) -> float:
        inside = eye + x @ x.T @ torch.linalg.inv(hidden + 0.09 * eye)
        return float(torch.linalg.slogdet(inside).logabsdet) / (2 * math.log(2))

    assert growing.bits() == pytest.approx(definition(s @ s.T), rel=1e-8, abs=1e-8)
    assert growing.bits_known() == pytest.approx(definition(0 * s @ s.T), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("noise", [1e-2, 1e-6, 1e-8])
@pytest.mark.parametrize("secrets, inputs", [(0, 6), (3, 6), (8, 6), (8, 12)])
def test_bits_are_right_at_any_noise(noise: float, secrets: int, inputs: int) -> None:
    """Against one QR of everything; twelve inputs explain all that secrets do."""
    by_secrets, by_inputs = matrices(2, secrets, inputs, 4)
    growing = Information(secrets, noise)
    for s, x in zip(by_secrets, by_inputs, strict=True):
        growing.add(s, x)
    s, x = torch.cat(by_secrets) / noise, torch.block_diag(*by_inputs) / noise

    def reference(columns: Tensor) -> float:
        eye = torch.eye(columns.shape[1], dtype=torch.float64)
        r = torch.linalg.qr(torch.cat([columns, eye])).R
        return 2 * float(torch.linalg.slogdet(r).logabsdet) / (2 * math.log(2))

    both = reference(torch.cat([x, s], dim=1))
    assert growing.bits() == pytest.approx(both - reference(s), rel=1e-6, abs=1e-6)
    assert growing.bits_known() == pytest.approx(reference(x), rel=1e-6, abs=1e-6)


def test_a_cancellation_that_costs_too_much_does_not_count() -> None:
    """A secret of which the observation hears next to nothing hides next to nothing."""
    deaf = torch.tensor([[1e-12]], dtype=torch.float64)
    growing = Leftover(1, 1e-8)
    growing.add(deaf, torch.ones(1, 1, dtype=torch.float64))
    assert float(growing.spectrum()) == pytest.approx(1, abs=1e-6)


def test_jacobians_are_those_of_finite_differences() -> None:
    model = classified([nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Sigmoid()], 8)
    x, y = pictures(1, SHAPE)
    secrets = {n: p.detach() for n, p in model.named_parameters() if n.startswith("1.")}
    presented = Presented(observed(model, x, y, tuple(secrets)), x, y, secrets)
    for jacobian, at, seen in (
        (presented.by_inputs(0), x[0], lambda v: presented.seen(0, v, presented.secrets)),
        (presented.by_secrets(0), presented.secrets, lambda v: presented.seen(0, x[0], v)),
    ):
        steps = torch.eye(at.numel(), dtype=at.dtype).view(-1, *at.shape) * 1e-6
        columns = [(seen(at + step) - seen(at - step)) / 2e-6 for step in steps]
        torch.testing.assert_close(jacobian, torch.stack(columns, 1), atol=1e-7, rtol=1e-5)


# ------------------------------------------------------------------------ bits and priors


def test_bits_fall_as_the_law_of_the_shift_widens() -> None:
    model = classified([Affine(SHAPE, scale=False)], 9)
    bits = [certified(model, 1, SHAPE, ("0.beta",), width=w)[0].bits for w in (0.01, 1, 30, 1e4)]
    known = certified(model, 1, SHAPE, ("0.beta",))[0].bits_known
    assert known > bits[0] > bits[1] > bits[2] > bits[3] > 0
    assert bits[0] > 0.9 * known
    assert bits[3] < 1e-6


@pytest.mark.parametrize(
    "options, scale, shift",
    [
        ({"scheme": "pad", "spread": 7.0, "scale_law": "wide"}, math.sqrt(10), 7.0),
        ({"scheme": "pad", "scale_law": "normal"}, 1.0, 3.0),
        ({"scheme": "channel", "spread": 2.0}, 2.0, 0.3),
        ({"scheme": "channel", "spread": 2.0, "shift_spread": None}, 2.0, 2.0),
        ({"scheme": "paper"}, 1.0, 1.0),
    ],
)
def test_prior_is_the_law_of_the_spec(options: dict, scale: float, shift: float) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(16, 3))
    locked = lock(model, Key.generate(), example=torch.rand(4, 1, 4, 4), **options)
    prior = prior_of(lock_spec(locked), held_secrets(locked))
    assert prior.secrets["0.inserted_norm.keylock.gamma"] == pytest.approx(scale)
    assert prior.secrets["0.inserted_norm.keylock.beta"] == pytest.approx(shift)
    if options["scheme"] == "pad":
        assert prior.secrets["0.weight"] == pytest.approx(1 / math.sqrt(27))
        assert prior.secrets["0.bias"] == pytest.approx(1 / math.sqrt(27))


def test_certificate_is_plain_data() -> None:
    (found,) = certified(classified([Affine(SHAPE, scale=False)], 9), 1, SHAPE, ("0.beta",))
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["directions"] == 0
    assert len(data["spectrum"]) == data["of"] == 9
    assert data["prior"]["secrets"] == {"0.beta": 1.0}
    assert data["tolerance"] == 1e-6


# ------------------------------------------------------------------------ refusals


MODEL = classified([Affine(SHAPE, scale=False)], 9)
X, Y = pictures(2, SHAPE)
HELD = {"0.beta": MODEL[0].beta.detach()}
SEEN = observed(MODEL, X, Y, ("0.beta",))
PRIOR = Prior(0.3, 0.01, {"0.beta": 1.0})


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"tolerance": 1e-9}, ConfigError, "tolerance must be"),
        ({"updates": [3]}, ConfigError, "from 1 to 2"),
        ({"updates": []}, ConfigError, "from 1 to 2"),
        ({"prior": Prior(0.3, 0.01, {})}, ConfigError, "says nothing about 0.beta"),
        ({"labels": (Y + 1) % CLASSES}, AttackError, "pass the true ones"),
        ({"images": X.flip(0)}, AttackError, "pass the true ones"),
        ({"images": X[:1]}, AttackError, "expected"),
        ({"secrets": {}}, AttackError, "0.beta is missing"),
        ({"secrets": {"0.beta": HELD["0.beta"] + 1}}, AttackError, "pass the true ones"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, error: type, message: str) -> None:
    right = {"images": X, "labels": Y, "secrets": HELD, "prior": PRIOR}
    assert certify(SEEN, **right)
    with pytest.raises(error, match=message):
        certify(SEEN, **{**right, **change})


class Casting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_a_model_that_casts_is_told_why_it_is_refused() -> None:
    model = nn.Sequential(Casting(), nn.Flatten(), nn.Linear(9, CLASSES))
    seen = observed(model, X, Y)
    prior = Prior(pixel=1.0, noise=0.01, secrets={})
    with pytest.raises(AttackError, match=r"computes in float64.*without casts") as caught:
        certify(seen, X, Y, {}, prior=prior)
    assert "parallel" not in str(caught.value)  # an option that certify does not have


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.001, self.training)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.Dropout(0.001), Dropping()])
def test_a_model_that_drops_is_told_why_it_is_refused(layer: nn.Module) -> None:
    """However little: what was dropped is not in the certificate."""
    model = nn.Sequential(nn.Flatten(), layer, nn.Linear(9, CLASSES)).double()
    with borrowed(derive(0, "drop")):
        seen = observed(model, X, Y)
    prior = Prior(pixel=1.0, noise=0.01, secrets={})
    state = torch.get_rng_state()
    with pytest.raises(AttackError, match=r"drops \(dropout\) cannot be certified.*rates to 0"):
        certify(seen, X, Y, {}, prior=prior)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_could_drop_and_does_not_is_certified() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(9, CLASSES)).double()
    seen, prior = observed(model, X, Y), Prior(pixel=1.0, noise=0.01, secrets={})
    assert certify(seen, X, Y, {}, prior=prior)
    model[1].p = 0.5
    seen = dataclasses.replace(seen, training=Training(train_mode=False))
    assert certify(seen, X, Y, {}, prior=prior)


def test_an_update_without_information_is_refused() -> None:
    """Of an image that the model is quite sure of, and right about, the gradient is zero."""
    model = classified([nn.Flatten()], 9)
    x, y = pictures(1, SHAPE)
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()[y[0]] = 1e4
    with pytest.raises(AttackError, match="does not depend on the image"):
        certify(observed(model, x, y), x, y, {}, prior=Prior(0.3, 0.01, {}))


@pytest.mark.parametrize("field", ["pixel", "noise", "secret"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_prior_deviations_are_positive(field: str, value: float) -> None:
    given_values = {"pixel": 0.3, "noise": 0.01, "secret": 1.0, field: value}
    with pytest.raises(ConfigError, match="must be a positive number"):
        Prior(given_values["pixel"], given_values["noise"], {"b": given_values["secret"]})


def test_what_would_not_fit_into_memory_is_refused_beforehand() -> None:
    check_size(1024, 9528, 14_914, 1)
    with pytest.raises(ConfigError, match="GB; take fewer"):
        check_size(3072, 376_832, 270_000, 1)
