"""Generators: trained on public images, kept in files, or brought by the user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from fedkl.attacks import (
    ConditionalGenerator,
    cached_generator,
    load_generator,
    save_generator,
    train_generator,
)
from fedkl.errors import CheckpointError, ConfigError, DataError
from fedkl.rng import derive

SMALL = {"steps": 800, "latent": 4, "width": 128}


def bars(count: int) -> tuple[Tensor, Tensor]:
    """One bright row (class 0) or column (class 1) per image, anywhere: (count, 1, 8, 8)."""
    generator = derive(0, "bars")
    y = torch.randint(2, (count,), generator=generator)
    at = torch.randint(8, (count,), generator=generator)
    x = torch.zeros(count, 1, 8, 8)
    for i in range(count):
        line = x[i, 0, at[i]] if y[i] == 0 else x[i, 0, :, at[i]]
        line.fill_(1)
    return x, y


@pytest.fixture(scope="module")
def trained() -> ConditionalGenerator:
    x, y = bars(500)
    return train_generator(x, y, 2, generator=derive(0, "g"), **SMALL)  # type: ignore[arg-type]


def test_it_learns_the_images_of_each_label(trained: ConditionalGenerator) -> None:
    z = torch.randn(64, 4, generator=derive(1, "z"))
    for label, axis in ((0, 2), (1, 1)):
        made = trained(z, torch.full((64,), label)).squeeze(1)
        lines = made.mean(dim=axis)  # brightness of the 8 rows, or columns
        assert float(lines.max(dim=1).values.mean()) > 0.5
        assert float(lines.sum(dim=1).mean()) == pytest.approx(1, abs=0.25)
        # Different latents make different lines.
        assert len(lines.argmax(dim=1).unique()) >= 5  # type: ignore[no-untyped-call]


def test_it_is_frozen_and_works_under_vmap(trained: ConditionalGenerator) -> None:
    assert not trained.training
    assert not any(p.requires_grad for p in trained.parameters())
    z, y = torch.randn(3, 2, 4), torch.tensor([[0, 1], [1, 1], [0, 0]])
    both = vmap(trained)(z, y)
    torch.testing.assert_close(both.flatten(0, 1), trained(z.flatten(0, 1), y.flatten()))


def test_same_generator_same_weights() -> None:
    x, y = bars(20)
    first, second, other = (
        train_generator(x, y, 2, steps=3, width=8, generator=derive(seed, "g"))
        for seed in (0, 0, 1)
    )
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert not torch.equal(first.label.weight, other.label.weight)


def test_progress_counts_steps() -> None:
    seen: list[tuple[int, int]] = []
    train_generator(
        *bars(10), 2, steps=60, width=8, generator=derive(0, "g"),
        progress=lambda done, of, loss: seen.append((done, of)),
    )  # fmt: skip
    assert seen == [(50, 60), (60, 60)]


def test_files_bring_the_same_images_back(trained: ConditionalGenerator, tmp_path: Path) -> None:
    path = tmp_path / "bars.safetensors"
    save_generator(path, trained, {"steps": 400})
    again = load_generator(path)
    z, y = torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1])
    assert torch.equal(again(z, y), trained(z, y))
    assert not again.training
    assert json.loads(Path(f"{path}.json").read_text())["facts"] == {"steps": 400}


def test_damaged_files_are_errors(trained: ConditionalGenerator, tmp_path: Path) -> None:
    path = tmp_path / "bars.safetensors"
    with pytest.raises(CheckpointError, match="does not exist"):
        load_generator(path)
    save_generator(path, trained)
    side = Path(f"{path}.json")
    right = side.read_text()
    for wrong in (right.replace('"latent": 4', '"latent": 5'), "{}", right.replace("v1", "v9")):
        side.write_text(wrong)
        with pytest.raises(CheckpointError, match="no generator of FedKL"):
            load_generator(path)
    side.write_text(right)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_generator(path)


def test_cache_trains_once_per_data_settings_and_randomness(tmp_path: Path) -> None:
    x, y = bars(20)
    trainings: list[int] = []

    def get(images: Tensor = x, seed: int = 0, steps: int = 2) -> ConditionalGenerator:
        return cached_generator(
            tmp_path / "cache", images, y, 2, steps=steps, width=8,
            generator=derive(seed, "g"), progress=lambda done, *_: trainings.append(done),
        )  # fmt: skip

    first, second = get(), get()
    assert len(trainings) == 1
    assert torch.equal(first.label.weight, second.label.weight)
    get(images=1 - x)
    get(seed=1)
    get(steps=3)
    assert len(trainings) == 4
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 4


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(2, 4, 4), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 1, 4, 4), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2)),
        (torch.full((2, 1, 4, 4), 255.0), torch.zeros(2, dtype=torch.int64)),
        (torch.full((2, 1, 4, 4), torch.nan), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0, 5])),
    ],
)
def test_data_that_cannot_be_used(x: Tensor, y: Tensor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected"):
        train_generator(x, y, 5, steps=1, generator=derive(0, "g"))
    with pytest.raises(DataError, match="expected"):
        cached_generator(tmp_path, x, y, 5, steps=1, generator=derive(0, "g"))


@pytest.mark.parametrize("settings", [{"steps": 0}, {"latent": 0}, {"width": 0}, {"weight": -1.0}])
def test_bad_settings_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        train_generator(*bars(4), 2, generator=derive(0, "g"), **{"steps": 1, **settings})
