"""The recursive closed form is exact, under any channel lock, and stops at a lock per position."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attackhelp import CLASSES, images, observe, tiny, uniform
from torch import Tensor, nn

from fedkl.attacks import Peel
from fedkl.attacks.peel import _nonzero
from fedkl.errors import AttackError, ConfigError
from fedkl.key import Key
from fedkl.locking import lock, lock_spec, shared_state
from fedkl.locking.rebuild import rebuild, secret_names
from fedkl.metrics import ssim, ssim_aligned
from fedkl.observation import Observation, Training, threat_of
from fedkl.rng import derive

SIZE = 8


def deep(*, norm: bool = False) -> nn.Module:
    """Two stages of convolution and sigmoid."""
    layers: list[nn.Module] = [nn.Conv2d(1, 6, 5, 2, padding=2)]
    layers += [nn.BatchNorm2d(6)] if norm else []
    layers += [nn.Sigmoid(), nn.Conv2d(6, 8, 5, 1, padding=2)]
    layers += [nn.BatchNorm2d(8)] if norm else []
    layers += [nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * 16, CLASSES)]
    return uniform(nn.Sequential(*layers), 1)


def locked_victims(
    plain: nn.Module, x: Tensor, y: Tensor, **settings: object
) -> tuple[list[Observation], nn.Module]:
    """Observations of a locked client, as an outsider who rebuilds the model sees them."""
    key = Key.generate()
    model = lock(plain, key, example=x[:2], **settings).train()  # type: ignore[arg-type]
    spec = lock_spec(model)
    outside = rebuild(uniform(type(plain)(*plain.children()), 9), spec)
    own = dict(outside.state_dict())
    with torch.no_grad():
        for name, tensor in shared_state(model).items():
            own[name].copy_(tensor)
    found = []
    for i in range(len(x)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        change = {
            n: p.grad.clone()
            for n, p in model.named_parameters()
            if n in shared_state(model) and p.grad is not None
        }
        found.append(
            Observation(
                model=outside, kind="gradient", changes=(change,), image_shape=tuple(x.shape[1:]),
                num_classes=CLASSES, training=Training(), threat=threat_of("adaptive"),
                secrets=secret_names(outside), spec=spec.to_dict(),
            )
        )  # fmt: skip
    return found, model


@pytest.fixture
def victims() -> tuple[Tensor, Tensor]:
    return images(3, (1, SIZE, SIZE)), torch.tensor([1, 3, 0])


@pytest.mark.parametrize("make", [tiny, deep], ids=["one stage", "two stages"])
def test_exact_without_a_norm(make: object, victims: tuple[Tensor, Tensor]) -> None:
    x, y = victims
    found = Peel().reconstruct(observe(make(), x, y), generator=derive(0, "a"))  # type: ignore[operator]
    made = torch.cat([one.images[0] for one in found])
    torch.testing.assert_close(made, x, atol=2e-3, rtol=0)
    assert torch.cat([one.labels[0] for one in found]).tolist() == y.tolist()


def test_exact_but_for_brightness_and_contrast_with_a_norm(
    victims: tuple[Tensor, Tensor],
) -> None:
    x, y = victims
    found = Peel().reconstruct(observe(deep(norm=True), x, y), generator=derive(0, "a"))
    made = torch.cat([one.images[0] for one in found])
    assert float(ssim_aligned(made, x).min()) > 0.98
    # Nothing but range is missing: stretch the truth in the same way.
    low, high = x.amin(dim=(1, 2, 3), keepdim=True), x.amax(dim=(1, 2, 3), keepdim=True)
    assert float(ssim(made, (x - low) / (high - low)).min()) > 0.95


@pytest.mark.parametrize("settings", [{}, {"spread": 3.0}, {"scheme": "fedbn"}])
def test_channel_lock_hides_nothing(
    settings: dict[str, object], victims: tuple[Tensor, Tensor]
) -> None:
    x, y = victims
    observations, _ = locked_victims(deep(), x, y, **settings)
    found = Peel().reconstruct(observations, generator=derive(0, "a"))
    made = torch.cat([one.images[0] for one in found])
    assert float(ssim_aligned(made, x).min()) > 0.9
    assert max(one.loss for one in found) < 0.2


def test_lock_per_position_stops_it(victims: tuple[Tensor, Tensor]) -> None:
    """A private stem leaves no gradient to peel; without one the pad's β hides the features."""
    x, y = victims
    observations, _ = locked_victims(deep(), x, y, scheme="pad")
    with pytest.raises(AttackError, match="is private"):
        Peel().reconstruct(observations, generator=derive(0, "a"))
    observations, _ = locked_victims(deep(), x, y, scheme="pad", stem=False, head=False)
    found = Peel().reconstruct(observations, generator=derive(0, "a"))
    made = torch.cat([one.images[0] for one in found])
    assert float(ssim_aligned(made, x).max()) < 0.5


@pytest.mark.parametrize("name, value", [("coarse", 1), ("coarse", 0), ("fine", 0)])
def test_settings_out_of_range_are_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} {value}.*expected 2 or more coarse, 1 or more"):
        Peel(**{name: value})


def test_equations_that_do_not_hold_are_said(victims: tuple[Tensor, Tensor]) -> None:
    x, y = victims
    seen = observe(deep(norm=True), x, y)
    exact = Peel().reconstruct(seen, generator=derive(0, "a"))
    assert all(one.notes == () for one in exact)
    generator = derive(1, "noise")

    def noised(value: Tensor) -> Tensor:
        return value + 0.01 * value.std() * torch.randn(value.shape, generator=generator)

    odd = [
        replace(one, changes=tuple({n: noised(g) for n, g in c.items()} for c in one.changes))
        for one in seen
    ]
    found = Peel().reconstruct(odd, generator=derive(0, "a"))
    made = torch.cat([one.images[0] for one in found])
    assert float(ssim_aligned(made, x).max()) < 0.5
    assert all("hold to a misfit of 0." in one.notes[0] for one in found)


def test_what_it_cannot_read_is_refused(victims: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    x, y = victims
    odd = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES))
    with pytest.raises(AttackError, match="Conv2d, ReLU"):
        Peel().reconstruct(observe(odd, x, y), generator=derive(0, "a"))
    with pytest.raises(AttackError, match="no observation"):
        Peel().reconstruct([], generator=derive(0, "a"))


def test_rectangular_kernels_are_refused(victims: tuple[Tensor, Tensor]) -> None:
    conv = nn.Conv2d(1, 4, (3, 5), padding=1)
    odd = nn.Sequential(conv, nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * 8 * 6, CLASSES))
    with pytest.raises(AttackError, match="0 is no plain square convolution"):
        Peel().reconstruct(observe(odd, *victims), generator=derive(0, "a"))


def test_equations_that_would_not_fit_are_refused() -> None:
    """Of 3 x 64 x 64 pixels they took 30 GB, and the audit ended."""
    conv = nn.Conv2d(3, 12, 5, 2, padding=2)
    large = nn.Sequential(conv, nn.Sigmoid(), nn.Flatten(), nn.Linear(12 * 32 * 32, CLASSES))
    x = torch.rand(1, 3, 64, 64, generator=derive(0, "x"))
    with pytest.raises(AttackError, match=r"0 on 3x64x64 numbers would take 34 GB"):
        Peel().reconstruct(observe(large, x, torch.tensor([1])), generator=derive(0, "a"))


def test_vanished_gradient_is_an_error_in_words() -> None:
    (seen,) = observe(tiny(), images(1, (1, 8, 8)), torch.tensor([1]))
    gone = ({name: torch.zeros_like(value) for name, value in seen.changes[0].items()},)
    with pytest.raises(AttackError, match="zero everywhere"):
        Peel().reconstruct([replace(seen, changes=gone)], generator=derive(0, "a"))


def test_what_is_divided_by_is_small_beside_the_largest_or_itself() -> None:
    values = torch.tensor([4.0, -1e-3, 0.0, -1e-20], dtype=torch.float64)
    assert _nonzero(values).tolist() == [4.0, -1e-3, 4e-12, 4e-12]
    assert float(_nonzero(torch.zeros(1, dtype=torch.float64))) > 0
