"""The gradient-matching loop: one table of attacks on one fixture of victims."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attackhelp import CLASSES, images, lenet, observe, tiny
from torch import Tensor

from fedkl.attacks import (
    DLG,
    EFFORTS,
    GGL,
    IDLG,
    ConditionalGenerator,
    InvertingGradients,
    make_attack,
)
from fedkl.attacks.matching import GradientMatching
from fedkl.attacks.network import Tensors
from fedkl.attacks.pixels import thirds, total_variation
from fedkl.attacks.search import Trial, Trials
from fedkl.audit.cells import on_each
from fedkl.errors import AttackError, ConfigError
from fedkl.metrics import ssim
from fedkl.observation import Observation
from fedkl.rng import derive

QUICK = [
    DLG(iterations=120),
    IDLG(iterations=120),
    InvertingGradients(iterations=150),
]


@pytest.fixture(scope="module")
def victims() -> tuple[list[Observation], Tensor, Tensor]:
    x, y = images(3, (1, 8, 8)), torch.tensor([1, 3, 0])
    return observe(tiny(), x, y), x, y


@pytest.mark.parametrize("attack", QUICK, ids=lambda a: a.name)
def test_images_and_labels_come_back(
    attack: GradientMatching, victims: tuple[list[Observation], Tensor, Tensor]
) -> None:
    observations, x, y = victims
    found = attack.reconstruct(observations, generator=derive(0, "attack"))
    made = torch.cat([one.images[0] for one in found])
    assert made.shape == x.shape
    assert made.dtype == torch.float32
    assert 0 <= float(made.min()) <= float(made.max()) <= 1
    assert torch.cat([one.labels[0] for one in found]).tolist() == y.tolist()
    assert float(ssim(made, x).mean()) > 0.8
    for one in found:
        assert list(one.losses) == sorted(one.losses, reverse=True)
        assert one.loss == pytest.approx(one.losses[-1])
        assert one.frames is not None
        assert one.frames.shape == (len(one.iterations), 1, 8, 8)


@pytest.mark.parametrize("attack", QUICK, ids=lambda a: a.name)
def test_same_generator_same_images(
    attack: GradientMatching, victims: tuple[list[Observation], Tensor, Tensor]
) -> None:
    short = type(attack)(iterations=8)  # type: ignore[call-arg]
    first, second, other = (
        short.reconstruct(victims[0], generator=derive(seed, "attack")) for seed in (0, 0, 1)
    )
    assert torch.equal(first[0].images, second[0].images)
    assert not torch.equal(first[0].images, other[0].images)


def test_side_by_side_is_one_by_one(
    victims: tuple[list[Observation], Tensor, Tensor],
) -> None:
    """Trials do not touch each other: the same starts give the same images in any company."""

    class Same(InvertingGradients):
        def start(self, trials: Trials, generator: torch.Generator) -> dict[str, Tensor]:
            size = trials.shape[1:]
            x = torch.rand(size, generator=derive(7, "same"))
            return {"images": x.expand(trials.shape).clone()}

    attack = Same(iterations=30)
    together = attack.reconstruct(victims[0], generator=derive(0, "a"))
    for i, observation in enumerate(victims[0]):
        alone = attack.reconstruct([observation], generator=derive(0, "a"))[0]
        # A sign of a gradient near zero may differ by rounding, so not to the last bit.
        assert float((alone.images - together[i].images).abs().mean()) < 0.02


def test_best_restart_is_chosen_by_loss_alone(
    victims: tuple[list[Observation], Tensor, Tensor],
) -> None:
    one = InvertingGradients(iterations=25, restarts=1)
    many = InvertingGradients(iterations=25, restarts=6, parallel=4)
    single = one.reconstruct(victims[0], generator=derive(0, "a"))
    several = many.reconstruct(victims[0], generator=derive(0, "a"))
    assert sum(s.loss for s in several) < sum(s.loss for s in single)


def test_lost_trials_start_over(victims: tuple[list[Observation], Tensor, Tensor]) -> None:
    class Fragile(DLG):
        """Its first start is not a number; the next ones are."""

        calls = 0

        def start(self, trials: Trials, generator: torch.Generator) -> dict[str, Tensor]:
            unknowns = super().start(trials, generator)
            if not self.calls:
                unknowns["images"][1] = torch.nan
            self.calls += 1
            return unknowns

    found = Fragile(iterations=80).reconstruct(victims[0], generator=derive(0, "a"))
    assert [one.restarts for one in found] == [0, 1, 0]
    assert float(ssim(found[1].images[0], victims[1][1:2])) > 0.5


def test_batch_and_several_updates_keep_their_shape() -> None:
    model = tiny()
    x, y = images(4, (1, 8, 8)), torch.tensor([0, 1, 2, 3])
    from attackhelp import gradient_of

    from fedkl.observation import OPEN, Training

    observation = Observation(
        model=model,
        kind="gradient",
        changes=(gradient_of(model, x[:2], y[:2]), gradient_of(model, x[2:], y[2:])),
        image_shape=(1, 8, 8),
        num_classes=CLASSES,
        training=Training(batch_size=2),
        threat=OPEN,
    )
    (found,) = InvertingGradients(iterations=5).reconstruct([observation], generator=derive(0, "a"))
    assert found.images.shape == (2, 2, 1, 8, 8)
    assert found.labels.shape == (2, 2)


def test_progress_ends_at_all(victims: tuple[list[Observation], Tensor, Tensor]) -> None:
    seen: list[tuple[int, int]] = []
    InvertingGradients(iterations=25, parallel=2).reconstruct(
        victims[0],
        generator=derive(0, "a"),
        progress=lambda done, of, loss: seen.append((done, of)),
    )
    assert seen[-1] == (25, 25)
    assert seen == sorted(seen)


def test_mixed_company_is_refused(victims: tuple[list[Observation], Tensor, Tensor]) -> None:
    other = observe(tiny(), images(1, (1, 8, 8)), torch.tensor([0]))
    with pytest.raises(AttackError, match="one batch"):
        DLG(iterations=1).reconstruct([*victims[0], *other], generator=derive(0, "a"))
    with pytest.raises(AttackError, match="no observation"):
        DLG(iterations=1).reconstruct([], generator=derive(0, "a"))


@pytest.mark.parametrize(
    "settings", [{"iterations": 0}, {"restarts": 0}, {"lr": 0.0}, {"tv": -1.0}, {"distance": "l3"}]
)
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        InvertingGradients(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["dlg", "idlg", "inverting-gradients"])
@pytest.mark.parametrize("effort", EFFORTS)
def test_registry_makes_what_it_says(name: str, effort: str) -> None:
    attack = make_attack(name, effort)
    assert attack.name == name
    assert repr(attack).startswith(type(attack).__name__)
    assert "iterations=" in repr(attack)


def test_unknown_attack_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="inverting-gradients"):
        make_attack("inverting")
    with pytest.raises(ConfigError, match="effort"):
        make_attack("dlg", "huge")


def test_step_decays_where_the_paper_says() -> None:
    rates = [thirds(share) for share in (0.0, 0.374, 0.375, 0.624, 0.625, 0.875)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.001])


def test_total_variation_of_a_step() -> None:
    x = torch.zeros(1, 1, 4, 4)
    x[..., 2:] = 1
    assert float(total_variation(x)) == pytest.approx(1 / 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack", [DLG(iterations=300, restarts=2), IDLG(iterations=300, restarts=2)]
)
def test_positive_control_on_lenet(attack: GradientMatching) -> None:
    """The published attacks work where they should: LeNet, weights U(±0.5), batch 1."""
    x = images(4, (1, 32, 32), seed=3)
    y = torch.tensor([1, 4, 7, 9])
    found = attack.reconstruct(observe(lenet(), x, y, classes=10), generator=derive(0, "a"))
    made = torch.cat([one.images[0] for one in found])
    assert float((ssim(made, x) > 0.8).float().mean()) >= 0.75


def test_labels_are_searched_where_the_classifier_is_private() -> None:
    """A private head takes the labels away, not the image from who searches both."""
    model = lenet(size=16)
    x, y = images(1, (1, 16, 16)), torch.tensor([2])
    open_ = observe(model, x, y, classes=10)[0]
    head = tuple(n for n, p in model.named_parameters() if n.startswith("fc."))
    change = {n: g for n, g in open_.changes[0].items() if n not in head}
    held = {n: p.detach() for n, p in model.named_parameters() if n in head}
    private = replace(open_, changes=(change,), secrets=head, known=held)
    attack = IDLG(iterations=400)
    (found,) = attack.reconstruct([private], generator=derive(0, "a"))
    assert found.labels.tolist() == [[2]]
    assert float(ssim(found.images[0], x)) > 0.9
    assert "searched" in found.notes[-1]
    (told,) = attack.reconstruct([open_], generator=derive(0, "a"))
    assert told.notes == ()
    made = ConditionalGenerator(latent=2, width=4, image_shape=(1, 16, 16), num_classes=10)
    with pytest.raises(AttackError, match="ggl needs labels"):
        GGL(made, iterations=1).reconstruct([private], generator=derive(0))


SHORT = [
    DLG(iterations=6),
    IDLG(iterations=6),
    InvertingGradients(iterations=6),
]


@pytest.mark.parametrize("factor, words", [(0.0, "is zero"), (1e25, "too large")])
@pytest.mark.parametrize("attack", SHORT, ids=lambda a: a.name)
def test_updates_that_cannot_be_matched_are_named(
    attack: GradientMatching,
    factor: float,
    words: str,
    victims: tuple[list[Observation], Tensor, Tensor],
) -> None:
    """They would be scored as attacks that failed; the audit goes on with the other victims."""
    odd = ({name: factor * value for name, value in victims[0][1].changes[0].items()},)
    seen = [victims[0][0], replace(victims[0][1], changes=odd), victims[0][2]]
    with pytest.raises(AttackError, match=words) as raised:
        attack.reconstruct(seen, generator=derive(0, "a"))
    assert list(raised.value.victims) == [1]
    found, failed = on_each(attack, seen, lambda: derive(0, "a"))
    assert sorted(found) == [0, 2]
    assert list(failed) == [1]


def test_a_victim_whose_loss_is_never_finite_is_named(
    victims: tuple[list[Observation], Tensor, Tensor],
) -> None:
    class Lost(DLG):
        """One victim's trials are never a number."""

        def decode(self, unknowns: Tensors, trial: Trial) -> tuple[Tensor, Tensor]:
            x, y = super().decode(unknowns, trial)
            mine = trial.changes["3.bias"] - victims[0][1].changes[0]["3.bias"]
            return torch.where((mine.abs() < 1e-6).all(), torch.nan, x), y

    attack = Lost(iterations=4, restarts=2)
    with pytest.raises(AttackError, match="finite loss") as raised:
        attack.reconstruct(victims[0], generator=derive(0, "a"))
    assert list(raised.value.victims) == [1]
    found = attack.reconstruct(victims[0], generator=derive(0, "a"), keep_lost=True)
    assert [one.loss == float("inf") for one in found] == [False, True, False]
