"""GRNN: a generator per victim, trained until its gradient is the observed one."""

from __future__ import annotations

import pytest
import torch
from attackhelp import CLASSES, gradient_of, images, lenet, observe, tiny
from torch import Tensor

from fedkl.attacks import GRNN
from fedkl.attacks.grnn import NOISE, TwoHeads, doublings
from fedkl.attacks.network import Network
from fedkl.attacks.search import Job, Trials
from fedkl.attacks.secrets import Held, Secrets
from fedkl.errors import ConfigError
from fedkl.metrics import ssim
from fedkl.observation import OPEN, Observation, Training
from fedkl.rng import derive

# Wide steps on small maps: seconds instead of minutes.
SMALL = {"iterations": 150, "width": 8, "latent": 32, "lr": 3e-4, "momentum": 0.9}


@pytest.fixture(scope="module")
def victims() -> tuple[list[Observation], Tensor, Tensor]:
    x, y = images(3, (1, 8, 8)), torch.tensor([1, 3, 0])
    return observe(tiny(), x, y), x, y


def test_images_and_labels_come_back(victims: tuple[list[Observation], Tensor, Tensor]) -> None:
    observations, x, y = victims
    seen: list[int] = []
    found = GRNN(**SMALL).reconstruct(  # type: ignore[arg-type]
        observations, generator=derive(0, "a"), progress=lambda done, *_: seen.append(done)
    )
    made = torch.cat([one.images[0] for one in found])
    assert float(ssim(made, x).mean()) > 0.9
    assert torch.cat([one.labels[0] for one in found]).tolist() == y.tolist()
    assert seen[-1] == 150
    assert all(one.loss < one.losses[0] / 10 for one in found)


@pytest.mark.slow
def test_published_rates_rebuild_an_image_of_lenet() -> None:
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    x = ((rows - 7).square() + 2 * (columns - 9).square() < 40).float().view(1, 1, 16, 16) * 0.8
    found = GRNN(iterations=300, width=16).reconstruct(
        observe(lenet(size=16), x, torch.tensor([7]), classes=10), generator=derive(0, "a")
    )
    assert float(ssim(found[0].images[0], x)) > 0.9
    assert found[0].labels.tolist() == [[7]]


def test_same_generator_same_images(victims: tuple[list[Observation], Tensor, Tensor]) -> None:
    attack = GRNN(iterations=4, width=8)
    first, second, other = (
        attack.reconstruct(victims[0], generator=derive(seed, "a")) for seed in (0, 0, 1)
    )
    assert torch.equal(first[2].images, second[2].images)
    assert not torch.equal(first[2].images, other[2].images)


def test_side_by_side_is_one_by_one(victims: tuple[list[Observation], Tensor, Tensor]) -> None:
    """The same generator weights and noise give the same images in any company."""

    class Same(GRNN):
        def start(self, trials: Trials, generator: torch.Generator) -> dict[str, Tensor]:
            one = super().start(trials, derive(3, "same"))
            return {n: v[:1].expand_as(v).clone() for n, v in one.items() if n != NOISE} | {
                NOISE: torch.ones_like(one[NOISE])
            }

    class First(Same):
        """Weights drawn for a company of three, whatever the company."""

        def start(self, trials: Trials, generator: torch.Generator) -> dict[str, Tensor]:
            jobs = [Job(i) for i in range(3)]
            whole = Trials.of(victims[0], trials.network, jobs, trials.secrets)
            return {
                n: v[: trials.count].clone() for n, v in super().start(whole, generator).items()
            }

    attack = First(iterations=20, width=8)
    together = attack.reconstruct(victims[0], generator=derive(0, "a"))
    for i, observation in enumerate(victims[0]):
        alone = attack.reconstruct([observation], generator=derive(0, "a"))[0]
        torch.testing.assert_close(alone.images, together[i].images, atol=1e-3, rtol=0)
        assert alone.loss == pytest.approx(together[i].loss, rel=1e-3)


def test_lost_trials_start_over(victims: tuple[list[Observation], Tensor, Tensor]) -> None:
    class Fragile(GRNN):
        """The first weights of the second trial are not numbers; the next ones are."""

        def start(self, trials: Trials, generator: torch.Generator) -> dict[str, Tensor]:
            unknowns = super().start(trials, generator)
            if not bool(flag):
                flag.fill_(True)
                unknowns["image.weight"][1] = torch.nan
            return unknowns

    flag = torch.tensor(False)
    found = Fragile(iterations=40, width=8).reconstruct(victims[0], generator=derive(0, "a"))
    assert [one.restarts for one in found] == [0, 1, 0]
    assert all(one.loss < one.losses[1] for one in found)


def test_batches_and_several_updates_have_one_generator_and_noise_each() -> None:
    model = tiny(norm=True)
    x, y = images(4, (1, 8, 8)), torch.tensor([0, 1, 2, 3])
    observation = Observation(
        model=model,
        kind="gradient",
        changes=(gradient_of(model, x[:2], y[:2]), gradient_of(model, x[2:], y[2:])),
        image_shape=(1, 8, 8),
        num_classes=CLASSES,
        training=Training(batch_size=2),
        threat=OPEN,
    )
    for labels in ("search", "infer"):
        (found,) = GRNN(iterations=30, width=8, labels=labels).reconstruct(
            [observation], generator=derive(0, "a")
        )
        assert found.images.shape == (2, 2, 1, 8, 8)
        assert found.labels.shape == (2, 2)
        flat = found.images.flatten(0, 1).flatten(1)
        assert float(torch.cdist(flat, flat)[0, 1:].min()) > 0.01
        assert found.loss < found.losses[0]


class Searched(Secrets):
    """The last bias is private and searched, from zero."""

    def given(self, observation: Observation, network: Network) -> dict[str, Tensor]:
        return {}

    def start(
        self, observations: object, rows: object, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return {"secret:bias": torch.zeros(len(rows), 6)}  # type: ignore[arg-type]

    def values(self, unknowns: object, given: object, network: Network) -> dict[str, Tensor]:
        return {"0.bias": unknowns["secret:bias"]}  # type: ignore[index]

    def prior(self, unknowns: object) -> Tensor:
        return (unknowns["secret:bias"] - 1).square().sum()  # type: ignore[index]


def test_secrets_have_a_rate_of_their_own() -> None:
    model = tiny()
    x, y = images(1, (1, 8, 8)), torch.tensor([1])
    (plain,) = observe(model, x, y)
    hidden = Observation(
        model=model,
        kind="gradient",
        changes=plain.changes,
        image_shape=plain.image_shape,
        num_classes=CLASSES,
        training=plain.training,
        threat=OPEN,
        secrets=("0.bias",),
    )
    losses = [
        attack.reconstruct([hidden], generator=derive(0, "a"), secrets=secrets)[0].loss
        for attack, secrets in [
            (GRNN(iterations=60, width=8, momentum=0.0, secret_lr=0.05), Searched()),
            (GRNN(iterations=60, width=8, momentum=0.0, secret_lr=1e-6), Searched()),
        ]
    ]
    # The prior alone is 6 at the start; only a rate fit for secrets gets it down.
    assert losses[0] < losses[1] - 3
    (held,) = GRNN(iterations=2, width=8).reconstruct(
        [hidden], generator=derive(0, "a"), secrets=Held()
    )
    assert held.images.shape == (1, 1, 1, 8, 8)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 5, 9), (1, 1, 1)])
def test_generator_makes_any_size(shape: tuple[int, int, int]) -> None:
    x, logits = TwoHeads(16, 4, shape, 7)(torch.randn(2, 16))
    assert x.shape == (2, *shape)
    assert logits.shape == (2, 7)
    assert 0 <= float(x.detach().min()) <= float(x.detach().max()) <= 1


def test_maps_double() -> None:
    assert doublings(32, 32) == [(4, 4), (8, 8), (16, 16), (32, 32)]
    assert doublings(28, 9) == [(4, 2), (7, 3), (14, 5), (28, 9)]


@pytest.mark.parametrize(
    "settings",
    [
        {"iterations": 0},
        {"lr": 0.0},
        {"secret_lr": -1.0},
        {"tv": -1.0},
        {"tv": float("nan")},
        {"lr": float("nan")},
        {"momentum": 1.0},
        {"width": 0},
        {"latent": 0},
        {"distance": "l3"},
        {"labels": "guess"},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=name if name not in ("distance", "labels") else "l"):
        GRNN(**settings)  # type: ignore[arg-type]


def test_repr_tells_every_setting_and_a_run_changes_nothing(
    victims: tuple[list[Observation], Tensor, Tensor],
) -> None:
    attack = GRNN(iterations=2, width=8)
    before = repr(attack), dict(vars(attack))
    attack.reconstruct(victims[0], generator=derive(0, "a"))
    assert (repr(attack), dict(vars(attack))) == before
    assert "momentum=0.99" in before[0]
    assert "iterations=2" in before[0]
