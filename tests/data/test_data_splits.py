"""Splits are disjoint, complete, repeatable; the test split is the same for every seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedkl.data import DATASETS, DataBundle, Images, TensorImages, load, splits
from fedkl.data.sources import Source
from fedkl.errors import ConfigError, DataError


def numbered(count: int, test: int | None) -> Source:
    """Images that carry their number in their bytes, so that splits can be told apart."""

    def images(start: int, stop: int) -> Images:
        number = torch.arange(start, stop)
        raw = torch.stack([number >> 16, number >> 8, number], dim=1) & 255
        return TensorImages(raw.to(torch.uint8).view(-1, 3, 1, 1), number % 10, image_size=1)

    names = tuple(str(i) for i in range(10))
    tests = None if test is None else images(count, count + test)
    return Source(names, images(0, count), tests, "made up")


def numbers(images: Images) -> Tensor:
    x, y = images.batch(torch.arange(len(images)))
    number = (x.view(-1, 3) * 255).round().long() @ torch.tensor([1 << 16, 1 << 8, 1])
    assert torch.equal(number % 10, y)
    return number


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    source = numbered(*request.param)
    monkeypatch.setattr(splits, "DATASETS", {"made-up": lambda root, c, s: source})


def parts(bundle: DataBundle) -> dict[str, Tensor]:
    names = ("train", "public", "validation", "test")
    return {name: numbers(getattr(bundle, name)) for name in names}


@pytest.mark.parametrize(
    "made_up, sizes",
    [
        ((60_000, 100), (45_000, 10_000, 5_000, 100)),
        ((40_000, 100), (25_000, 10_000, 5_000, 100)),
        ((39_999, 100), (30_000, 6_666, 3_333, 100)),
        ((1_000, None), (601, 133, 66, 200)),
        ((5, 3), (5, 0, 0, 3)),
    ],
    indirect=["made_up"],
)
def test_splits_are_disjoint_and_complete(made_up: None, sizes: tuple[int, ...]) -> None:
    found = parts(load("made-up"))
    assert tuple(len(found[n]) for n in ("train", "public", "validation", "test")) == sizes
    together = torch.cat(list(found.values()))  # sizes add up to all there are, so: 0 to n - 1
    assert torch.equal(together.sort().values, torch.arange(len(together)))


@pytest.mark.parametrize("made_up", [(1_000, None), (1_000, 50)], indirect=True)
def test_the_seed_moves_every_split_but_the_test_split(made_up: None) -> None:
    first, again, other = (parts(load("made-up", seed=seed)) for seed in (0, 0, 1))
    for name in first:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], other[name]) == (name == "test")


@pytest.mark.parametrize("made_up", [(1_000, None)], indirect=True)
def test_a_test_split_of_our_own_is_a_fifth_of_each_class(made_up: None) -> None:
    bundle = load("made-up")
    assert bundle.test.labels.bincount().tolist() == [20] * 10
    assert not torch.equal(numbers(bundle.test), torch.arange(800, 1000))


@pytest.mark.parametrize("made_up", [(60_000, 9)], indirect=True)
def test_sizes_can_be_chosen(made_up: None) -> None:
    bundle = load("made-up", public=0, validation=7)
    assert (len(bundle.public), len(bundle.validation), len(bundle.train)) == (0, 7, 59_993)
    with pytest.raises(DataError, match="leave none of 60000"):
        load("made-up", public=59_000, validation=1_000)


@pytest.mark.parametrize(
    "options", [{"channels": 2}, {"image_size": 0}, {"public": -1}, {"validation": -1}]
)
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected 1 or 3 channels"):
        load("digits", **options)  # type: ignore[arg-type]


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'fashion-mnist'") as caught:
        load("fashion_mnist")
    assert all(name in str(caught.value) for name in DATASETS)


@pytest.mark.parametrize("channels, size", [(3, 32), (1, 16)])
def test_digits_end_to_end(channels: int, size: int) -> None:
    state = torch.get_rng_state()
    bundle = load("digits", channels=channels, image_size=size)
    assert bundle.num_classes == len(bundle.class_names) == 10
    assert bundle.image_shape == (channels, size, size)
    assert sum(map(len, (bundle.train, bundle.public, bundle.validation, bundle.test))) == 1797
    for images in (bundle.train, bundle.public, bundle.validation, bundle.test):
        x, y = images.batch(torch.arange(4))
        assert x.shape == (4, *bundle.image_shape)
        assert y.shape == (4,)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_root_may_be_a_plain_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):  # the builtin that DataNotFoundError promises
        load("mnist", root=tmp_path)
