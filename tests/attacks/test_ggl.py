"""GGL: the image is one that a generator can make; CMA-ES and gradient find which."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from attackhelp import CLASSES, gradient_of, observe, tiny
from torch import Tensor, nn

from fedkl.attacks import GGL, make_attack
from fedkl.attacks.evolution import MOST_UNKNOWNS, Evolution
from fedkl.attacks.ggl import LATENT, divergence
from fedkl.attacks.search import Trials
from fedkl.errors import AttackError, ConfigError
from fedkl.metrics import ssim
from fedkl.observation import OPEN, Observation, Training
from fedkl.rng import derive


class Waves(nn.Module):
    """A fixed generator: one pattern per label plus random smooth patterns times the latent."""

    latent = 6

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        generator = derive(0, "waves")
        coarse = torch.randn(CLASSES + self.latent, 1, 4, 4, generator=generator)
        patterns = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
        self.register_buffer("base", patterns[:CLASSES])
        self.register_buffer("ways", patterns[CLASSES:])

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return (self.base[y] + torch.einsum("nd,dchw->nchw", z, self.ways)).sigmoid()


@pytest.fixture(scope="module")
def victims() -> tuple[list[Observation], Tensor, Tensor]:
    y = torch.tensor([1, 3, 0])
    x = Waves()(torch.randn(3, 6, generator=derive(0, "z")), y)
    return observe(tiny(), x, y), x, y


FAST = {
    "gradient": GGL(Waves(), iterations=150),
    "cma-es": GGL(Waves(), iterations=80, search="cma-es"),
}


@pytest.mark.parametrize("search", FAST)
def test_latent_and_label_are_found(
    search: str, victims: tuple[list[Observation], Tensor, Tensor]
) -> None:
    observations, x, y = victims
    seen: list[int] = []
    found = FAST[search].reconstruct(
        observations, generator=derive(0, "a"), progress=lambda done, *_: seen.append(done)
    )
    made = torch.cat([one.images[0] for one in found])
    assert torch.cat([one.labels[0] for one in found]).tolist() == y.tolist()
    mean = torch.stack([Waves()(torch.randn(200, 6), c.expand(200)).mean(0) for c in y])
    floor = float(ssim(mean, x).mean())
    assert float(ssim(made, x).mean()) > max(0.95, floor + 0.1)
    assert seen[-1] == FAST[search].iterations
    for one in found:
        assert list(one.losses) == sorted(one.losses, reverse=True)


@pytest.mark.parametrize("search", FAST)
def test_same_generator_same_images_and_no_global_randomness(
    search: str, victims: tuple[list[Observation], Tensor, Tensor]
) -> None:
    attack = GGL(Waves(), iterations=6, search=search)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index, union-attr]
    first, second, other = (
        attack.reconstruct(victims[0], generator=derive(seed, "a")) for seed in (0, 0, 1)
    )
    assert torch.equal(first[2].images, second[2].images)
    assert not torch.equal(first[2].images, other[2].images)
    assert np.array_equal(np.random.get_state()[1], before[0])  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_side_by_side_is_one_by_one(victims: tuple[list[Observation], Tensor, Tensor]) -> None:
    class Same(GGL):
        def start(self, trials: Trials, generator: torch.Generator) -> dict[str, Tensor]:
            z = torch.randn((*trials.shape[1:3], 6), generator=derive(7, "same"))
            return {LATENT: z.expand(trials.count, *z.shape).clone()}

    attack = Same(Waves(), iterations=20)
    together = attack.reconstruct(victims[0], generator=derive(0, "a"))
    for i, observation in enumerate(victims[0]):
        (alone,) = attack.reconstruct([observation], generator=derive(0, "a"))
        torch.testing.assert_close(alone.images, together[i].images, atol=1e-3, rtol=0)


def test_chunks_of_a_population_change_nothing(
    victims: tuple[list[Observation], Tensor, Tensor],
) -> None:
    """parallel limits what is in memory at once; three victims fit either way."""
    losses = []
    for parallel in (3, 300):
        attack = GGL(Waves(), iterations=5, search="cma-es", parallel=parallel)
        found = attack.reconstruct(victims[0], generator=derive(0, "a"))
        losses.append([one.loss for one in found])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("search", FAST)
def test_lost_trials_start_over(
    search: str, victims: tuple[list[Observation], Tensor, Tensor]
) -> None:
    calls = []

    class Fragile(GGL):
        """The second trial's first latent is not a number; the next ones are."""

        def start(self, trials: Trials, generator: torch.Generator) -> dict[str, Tensor]:
            unknowns = super().start(trials, generator)
            if not calls:
                unknowns[LATENT][1] = torch.nan if search == "gradient" else 1e38
            calls.append(1)
            return unknowns

    attack = Fragile(Waves(), iterations=60, search=search)
    found = attack.reconstruct(victims[0], generator=derive(0, "a"))
    assert [one.restarts for one in found] == [0, 1, 0]
    assert float(ssim(found[1].images[0], victims[1][1:2])) > 0.8


def test_batches_have_a_latent_per_image() -> None:
    model = tiny()
    y = torch.tensor([0, 1, 2, 3])
    x = Waves()(torch.randn(4, 6, generator=derive(0, "z")), y)
    observation = Observation(
        model=model,
        kind="gradient",
        changes=(gradient_of(model, x[:2], y[:2]), gradient_of(model, x[2:], y[2:])),
        image_shape=(1, 8, 8),
        num_classes=CLASSES,
        training=Training(batch_size=2),
        threat=OPEN,
        labels=y.view(2, 2),
    )
    for search, iterations in (("gradient", 80), ("cma-es", 80)):
        attack = GGL(Waves(), iterations=iterations, search=search)
        (found,) = attack.reconstruct([observation], generator=derive(0, "a"))
        assert found.labels.tolist() == [[0, 1], [2, 3]]
        assert float(ssim(found.images.flatten(0, 1), x).mean()) > 0.8


def test_divergence_is_zero_for_the_standard_law_alone() -> None:
    z = torch.tensor([-1.0, 1.0])
    assert float(divergence(z)) == pytest.approx(0, abs=1e-6)
    # KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2
    assert float(divergence(2 * z + 3)) == pytest.approx((9 + 4 - 1 - np.log(4)) / 2)


def test_missing_cma_names_the_extra(
    victims: tuple[list[Observation], Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    attack = GGL(Waves(), iterations=2, search="cma-es")
    with pytest.raises(ConfigError, match=r"fedkl\[audit\]"):
        attack.reconstruct(victims[0], generator=derive(0, "a"))


def test_too_many_unknowns_for_cma() -> None:
    with pytest.raises(AttackError, match="2001 unknowns"):
        Evolution(
            lambda: {"z": torch.zeros(1, MOST_UNKNOWNS + 1)},
            spread=1.0,
            population=None,
            generator=derive(0, "a"),
        )


def test_generators_that_do_not_fit(victims: tuple[list[Observation], Tensor, Tensor]) -> None:
    with pytest.raises(AttackError, match="attribute latent"):
        GGL(nn.Linear(2, 2))
    with pytest.raises(AttackError, match=r"\(1, 1, 9, 9\)"):
        GGL(Waves(9), iterations=2).reconstruct(victims[0], generator=derive(0, "a"))


@pytest.mark.parametrize(
    "settings",
    [
        {"search": "random"},
        {"lr": 0.0},
        {"kl": -1.0},
        {"kl": float("nan")},
        {"lr": float("nan")},
        {"spread": 0.0},
        {"population": 2},
        {"secret_lr": 0.0},
        {"iterations": 0},
        {"distance": "l3"},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        GGL(Waves(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("effort", ["quick", "standard", "paper"])
def test_registry_hands_the_generator_over(effort: str) -> None:
    attack = make_attack("ggl", effort, generator_model=Waves())
    assert attack.name == "ggl"
    assert "generator_model='Waves'" in repr(attack)
    with pytest.raises(AttackError, match="generator_model"):
        make_attack("ggl", effort)
    for name in ("grnn", "closed-form"):
        assert make_attack(name, effort).name == name
