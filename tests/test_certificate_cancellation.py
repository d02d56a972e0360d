"""The zero by construction: where it holds, where it does not, and what it costs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, cross_entropy

from fedkl.certificate import Cancellation, cancellation, certify, prior_of
from fedkl.errors import AttackError
from fedkl.key import Key
from fedkl.locking import lock, lock_spec, shared_state
from fedkl.locking.rebuild import held_secrets, rebuild, secret_names
from fedkl.observation import THREATS, Observation, Training
from fedkl.rng import derive

CLASSES = 3
KEY = Key.generate()


class Shortcut(nn.Module):
    """A path from the image to the classifier beside the first lock."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.head, self.around = nn.Linear(2 * 36, CLASSES), nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.sigmoid(self.norm(self.conv(x)))
        return self.head(inside.flatten(1)) + self.around(x.flatten(1))


def plain() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Sigmoid()),
        *(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Sigmoid()),
        *(nn.Flatten(), nn.Linear(72, CLASSES)),
    )


def seen(
    model: nn.Module, images: Tensor, labels: Tensor, **settings: object
) -> tuple[Observation, dict[str, Tensor]]:
    """What an outsider sees of updates (T, batch, C, H, W), and the secrets behind them."""
    locked = lock(model, KEY, example=torch.rand(4, 1, 6, 6), **settings).train()
    names, changes, statistics = set(shared_state(locked)), [], []
    start = {n: b.clone() for n, b in locked.named_buffers()}
    for x, y in zip(images, labels, strict=True):
        locked.zero_grad()
        locked.load_state_dict(start, strict=False)
        cross_entropy(locked(x), y).backward()
        changes.append({n: p.grad.clone() for n, p in locked.named_parameters() if n in names})
        buffers = locked.named_buffers()
        statistics.append({n: b.clone() for n, b in buffers if n in names})
    twin = rebuild(model, lock_spec(locked))
    observation = Observation(
        model=twin,
        kind="gradient",
        changes=tuple(changes),
        image_shape=(1, 6, 6),
        num_classes=CLASSES,
        training=Training(batch_size=images.shape[1]),
        threat=THREATS["adaptive"],
        secrets=secret_names(twin),
        spec=lock_spec(locked).to_dict(),
        statistics=tuple(statistics),
    )
    return observation, held_secrets(locked)


X, Y = torch.rand(1, 1, 1, 6, 6, generator=derive(0, "x")), torch.tensor([[1]])
OTHER = torch.rand(1, 6, 6, generator=derive(0, "other"))


def checked(model: nn.Module, **settings: object) -> Cancellation:
    observation, held = seen(model, X, Y, **settings)
    locked = lock(model, KEY, example=torch.rand(4, 1, 6, 6), **settings)
    return cancellation(
        observation,
        X,
        Y,
        held,
        OTHER,
        prior=prior_of(lock_spec(locked), held),
        generator=derive(0, "directions"),
    )


@pytest.mark.parametrize("settings", [{}, {"scale_law": "wide", "spread": 9.0}, {"head": True}])
def test_a_pad_on_the_only_path_hides_one_image(settings: dict[str, object]) -> None:
    found = checked(plain(), scheme="pad", **settings)
    assert found.cut
    assert max(found.remaining, found.swapped) < 1e-12


class Rows(nn.Module):
    """The rows of an image as tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def test_a_pad_over_tokens_hides_one_image() -> None:
    """Its norm was inserted and runs over rows: what comes out has another shape than it sees."""
    model = nn.Sequential(
        *(Rows(), nn.Linear(6, 4), nn.Sigmoid()),
        *(nn.Linear(4, 5), nn.Sigmoid(), nn.Flatten(), nn.Linear(30, CLASSES)),
    )
    found = checked(model, scheme="pad", behind="2", layers="first")
    assert found.cut
    assert max(found.remaining, found.swapped) < 1e-12


def test_the_gradient_of_a_shared_stem_is_a_path_beside_the_lock() -> None:
    found = checked(plain(), scheme="pad", stem=False)
    assert not found.cut
    assert min(found.remaining, found.swapped) > 1e-3


@pytest.mark.filterwarnings("ignore::fedkl.errors.ShortcutWarning")  # it is the point
def test_a_path_around_the_first_lock_is_found() -> None:
    found = checked(Shortcut(), scheme="pad")
    assert not found.cut
    assert min(found.remaining, found.swapped) > 1e-3


@pytest.mark.filterwarnings("ignore::fedkl.errors.ShortcutWarning")  # it is the point
def test_cancellation_agrees_with_the_dense_certificate() -> None:
    for model, hidden in ((plain(), True), (Shortcut(), False)):
        settings: dict[str, object] = {"scheme": "pad", "head": False}
        observation, held = seen(model, X, Y, **settings)
        locked = lock(model, KEY, example=torch.rand(4, 1, 6, 6), **settings)
        prior = prior_of(lock_spec(locked), held)
        (dense,) = certify(observation, X, Y, held, prior=prior)
        assert (dense.directions == 0) == hidden
        assert dense.known > 30


def test_shared_statistics_are_a_path_beside_the_lock() -> None:
    found = checked(plain(), scheme="pad", share_statistics=True)
    assert not found.cut
    assert min(found.remaining, found.swapped) > 1e-3


def test_shared_statistics_that_are_not_in_the_observation_are_asked_for() -> None:
    observation, held = seen(plain(), X, Y, scheme="pad", share_statistics=True)
    blind = replace(observation, statistics=())
    prior = prior_of(None, held)
    with pytest.raises(AttackError, match=r"has no 1\.running_mean; pass what was sent"):
        cancellation(blind, X, Y, held, OTHER, prior=prior, generator=derive(0))


def test_price_of_a_cancellation_falls_with_the_spread() -> None:
    found = [checked(plain(), scheme="pad", spread=spread) for spread in (1.0, 10.0)]
    assert found[0].shift == pytest.approx(10 * found[1].shift)
    assert 0 < found[1].shift < 1
    # To first order in the move the price is β·δ/spread², which falls with 1/spread.
    assert abs(found[1].nats) < abs(found[0].nats)
    assert math.isfinite(found[0].nats)


def test_a_channel_lock_has_nothing_to_cancel_with() -> None:
    with pytest.raises(AttackError, match="only a pad has a shift per position"):
        checked(plain(), scheme="channel")


def test_nats_are_the_difference_of_log_densities() -> None:
    model = plain()
    observation, held = seen(model, X, Y, scheme="pad", spread=3.0)
    spec = lock_spec(lock(model, KEY, scheme="pad", spread=3.0, example=torch.rand(4, 1, 6, 6)))
    prior = prior_of(spec, held)
    found = cancellation(observation, X, Y, held, OTHER, prior=prior, generator=derive(0, "d"))
    # The first lock by hand: what its norm puts out for either picture, and the shift between.
    weight, bias = held["0.weight"].double(), held["0.bias"].double()

    def normed(x: Tensor) -> Tensor:
        out = conv2d(x.double(), weight, bias, padding=1)
        return batch_norm(out, None, None, training=True, eps=model[1].eps)[0]

    gamma, beta = held["1.keylock.gamma"].double(), held["1.keylock.beta"].double()
    moved = beta + gamma * (normed(X[0]) - normed(OTHER[None]))
    law = torch.distributions.Normal(0.0, 3.0)
    expected = float((law.log_prob(beta) - law.log_prob(moved)).sum())
    assert found.nats == pytest.approx(expected, rel=1e-9)


def test_one_shift_does_not_cancel_for_two_images() -> None:
    x, y = torch.rand(1, 2, 1, 6, 6), torch.tensor([[0, 1]])
    observation, held = seen(plain(), x, y, scheme="pad")
    prior = prior_of(None, held)
    with pytest.raises(AttackError, match="one shift cancels the changes of one image"):
        cancellation(observation, x, y, held, OTHER, prior=prior, generator=derive(0))


def test_plain_data_says_whether_the_lock_cuts() -> None:
    data = checked(plain(), scheme="pad").to_dict()
    assert data["cut"] is True
    assert data["directions"] == 8
