"""Batches against a naive conversion, one image and one pixel at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms

from fedkl.data import FolderImages, TensorImages, augment
from fedkl.errors import ConfigError, DataError
from fedkl.rng import derive


def pixels(count: int, channels: int, height: int, width: int) -> Tensor:
    generator = derive(0, "pixels", count, channels, height, width)
    shape = (count, channels, height, width)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def naive(image: Tensor, channels: int, size: int) -> Tensor:
    """One image (c, h, w) as the documentation has it, slowly."""
    x = image.double() / 255
    if channels == 1 and len(x) == 3:
        x = (0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2])[None]
    height, width = x.shape[1:]
    if max(height, width) <= size <= 2 * min(height, width):
        out = torch.zeros(len(x), size, size, dtype=torch.float64)
        for row in range(height):
            for column in range(width):
                at = row + (size - height) // 2, column + (size - width) // 2
                out[:, at[0], at[1]] = x[:, row, column]
    else:
        out = F.interpolate(x[None], (size, size), mode="bilinear", antialias=True)[0]
    return out.repeat(channels // len(out), 1, 1)


@given(st.integers(4, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.sampled_from([1, 3]))
def test_batches_equal_the_naive_conversion(native: int, size: int, c: int, channels: int) -> None:
    raw = pixels(3, c, native, native)
    images = TensorImages(raw, torch.arange(3), channels=channels, image_size=size)
    x, y = images.batch(torch.tensor([2, 0, 2]))
    expected = torch.stack([naive(raw[i], channels, size) for i in (2, 0, 2)])
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert x.shape == (3, *images.image_shape)
    assert y.tolist() == [2, 0, 2]
    assert y.dtype == torch.int64
    # Resizing sums up to 40 products in float32; a pixel or its luma takes one to six roundings.
    tolerance = 3e-7 if native <= size <= 2 * native else 1e-5
    torch.testing.assert_close(x.double(), expected, atol=tolerance, rtol=0)
    assert x.min() >= 0
    assert x.max() <= 1


@pytest.mark.parametrize("height, width", [(28, 20), (40, 20), (10, 31)])
def test_images_that_are_not_square(height: int, width: int) -> None:
    raw = pixels(2, 1, height, width)
    x, _ = TensorImages(raw, torch.zeros(2)).batch(torch.arange(2))
    torch.testing.assert_close(x[1].double(), naive(raw[1], 3, 32), atol=1e-5, rtol=0)


def test_grey_of_28_is_centered_and_repeated() -> None:
    raw = torch.full((1, 1, 28, 28), 255, dtype=torch.uint8)
    x, _ = TensorImages(raw, torch.zeros(1)).batch(torch.tensor([0]))
    assert x.sum() == 3 * 28 * 28
    assert (x[0, :, 2:30, 2:30] == 1).all()


def test_tiny_images_are_resized_not_framed() -> None:
    raw = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    x, _ = TensorImages(raw, torch.zeros(1)).batch(torch.tensor([0]))
    assert (x == 1).all()


@pytest.mark.parametrize("size, framed", [(8, True), (9, False), (7, True), (5, True)])
def test_the_frame_ends_where_it_would_be_wider_than_the_image(size: int, framed: bool) -> None:
    raw = pixels(1, 1, 4, 4)
    x, _ = TensorImages(raw, torch.zeros(1), image_size=size).batch(torch.tensor([0]))
    start = (size - 4) // 2
    inside = x[0, 0, start : start + 4, start : start + 4] * 255
    assert torch.equal(inside.round().byte(), raw[0, 0]) == framed


def test_a_subset_is_a_view_and_composes() -> None:
    raw = pixels(10, 1, 28, 28)
    images = TensorImages(raw, torch.arange(10))
    odd = images.subset(torch.tensor([9, 7, 5, 3, 1]))
    inner = odd.subset(torch.tensor([3, 0]))
    assert (len(images), len(odd), len(inner)) == (10, 5, 2)
    assert inner.labels.tolist() == [3, 9]
    x, y = inner.batch(torch.tensor([1, 0]))
    reference, labels = images.batch(torch.tensor([9, 3]))
    assert torch.equal(x, reference)
    assert torch.equal(y, labels)
    raw[9] = 0  # seen through the view: nothing was copied
    assert not inner.batch(torch.tensor([1]))[0].any()


def test_writing_to_a_batch_leaves_the_images_alone() -> None:
    images = TensorImages(pixels(2, 3, 32, 32), torch.arange(2))
    x, _ = images.batch(torch.arange(2))
    kept = x.clone()
    x.zero_()
    assert torch.equal(images.batch(torch.arange(2))[0], kept)


def test_positions_beyond_a_subset_are_refused() -> None:
    part = TensorImages(pixels(5, 1, 4, 4), torch.arange(5)).subset(torch.arange(2))
    with pytest.raises(IndexError):
        part.batch(torch.tensor([2]))


def test_an_empty_batch_has_the_shape_of_a_batch() -> None:
    images = TensorImages(pixels(2, 1, 28, 28), torch.arange(2))
    x, y = images.batch(torch.zeros(0, dtype=torch.int64))
    assert x.shape == (0, 3, 32, 32)
    assert y.shape == (0,)


@pytest.mark.parametrize(
    "raw, labels",
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2)),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2)),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), torch.zeros(2)),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3)),
    ],
)
def test_tensors_that_are_no_images_are_refused(raw: Tensor, labels: Tensor) -> None:
    with pytest.raises(DataError, match="got"):
        TensorImages(raw, labels)


@pytest.mark.parametrize("channels, size", [(2, 32), (3, 0)])
def test_shapes_out_of_range_are_refused(channels: int, size: int) -> None:
    with pytest.raises(ConfigError, match=r"is [02]"):
        TensorImages(pixels(1, 1, 4, 4), torch.zeros(1), channels=channels, image_size=size)


def save(path: Path, array: np.ndarray) -> str:
    Image.fromarray(array).save(path)
    return str(path)


def test_files_are_resized_by_the_shorter_side_and_cropped(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (255, 0, 51)  # the center square
    images = FolderImages([(save(tmp_path / "a.png", wide), 4)], image_size=20)
    x, y = images.batch(torch.tensor([0]))
    assert x.shape == (1, 3, 20, 20)
    assert x.dtype == torch.float32
    assert y.tolist() == [4]
    assert torch.equal(x[0, :, 10, 10], torch.tensor([1, 0, 0.2]))
    assert (x[0, 0] == 1).all()


@pytest.mark.parametrize("height, width", [(20, 60), (61, 20), (33, 47), (50, 31), (16, 16)])
@pytest.mark.parametrize("size", [15, 16, 40])
def test_files_agree_with_torchvision(tmp_path: Path, height: int, width: int, size: int) -> None:
    array = pixels(1, 3, height, width)[0].permute(1, 2, 0).numpy()
    path = save(tmp_path / "a.png", array)
    x, _ = FolderImages([(path, 0)], image_size=size).batch(torch.tensor([0]))
    steps = transforms.Compose(
        [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    )
    assert torch.equal((x[0] * 255).round().byte(), steps(Image.open(path)))


def test_files_in_any_mode_become_color_or_grey(tmp_path: Path) -> None:
    color = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    grey = np.full((8, 8), 77, np.uint8)
    samples = [(save(tmp_path / "c.png", color), 0), (save(tmp_path / "g.png", grey), 1)]
    x, _ = FolderImages(samples, image_size=8).batch(torch.arange(2))
    assert (x[0, :, 0, 0] * 255).tolist() == pytest.approx([200, 100, 50])
    assert (x[1] * 255 - 77).abs().max() < 1e-4
    luma, _ = FolderImages(samples, channels=1, image_size=8).batch(torch.arange(2))
    assert luma.shape == (2, 1, 8, 8)
    assert luma[0, 0, 0, 0].item() * 255 == pytest.approx(0.299 * 200 + 58.7 + 5.7, abs=0.6)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_16_bits_is_scaled_to_8(tmp_path: Path, suffix: str, channels: int) -> None:
    deep = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
    samples = [(tmp_path / f"deep.{suffix}", 0)]
    x, _ = FolderImages(samples, channels=channels, image_size=8).batch(torch.tensor([0]))
    expected = torch.from_numpy(deep / 65535).expand(1, channels, 8, 8)
    torch.testing.assert_close(x.double(), expected, atol=0.5 / 255 + 1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_without_a_known_range_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "wide.tif")
    images = FolderImages([(tmp_path / "wide.tif", 0)], image_size=8)
    with pytest.raises(DataError, match=r"wide\.tif cannot be read .*8 or 16 bits"):
        images.batch(torch.tensor([0]))


def test_images_too_large_for_pillow_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    with pytest.raises(DataError, match=r"huge\.png cannot be read"):
        FolderImages([(tmp_path / "huge.png", 0)], image_size=8).batch(torch.tensor([0]))


def test_a_damaged_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "bad.png").write_bytes(Path(good).read_bytes()[:40])
    images = FolderImages([(good, 0), (tmp_path / "bad.png", 1)], image_size=8)
    images.batch(torch.tensor([0]))
    with pytest.raises(DataError, match=r"bad\.png cannot be read"):
        images.batch(torch.tensor([1]))


def naive_crops(x: Tensor) -> list[Tensor]:
    """All 9 * 9 * 2 images that the augmentation may give."""
    padded = F.pad(x, (4, 4, 4, 4))
    size = x.shape[-2:]
    crops = [padded[:, r : r + size[0], c : c + size[1]] for r in range(9) for c in range(9)]
    return crops + [crop.flip(2) for crop in crops]


def test_augmentation_gives_shifts_and_flips_of_each_image(generator: torch.Generator) -> None:
    x = torch.rand(40, 3, 12, 10, generator=generator)
    y = augment(x, generator)
    assert y.shape == x.shape
    assert y.is_contiguous()
    choices = set()
    for before, after in zip(x, y, strict=True):
        hits = [i for i, crop in enumerate(naive_crops(before)) if torch.equal(crop, after)]
        assert len(hits) == 1
        choices.update(hits)
    assert len(choices) > 20  # each image has its own draw
    assert 5 < sum(choice < 81 for choice in choices) < len(choices) - 5


def test_augmentation_depends_on_its_generator_alone() -> None:
    x = torch.rand(8, 1, 8, 8)
    kept, state = x.clone(), torch.get_rng_state()
    first, again = augment(x, derive(1, "a")), augment(x, derive(1, "a"))
    assert torch.equal(first, again)
    assert torch.equal(x, kept)
    assert not torch.equal(first, augment(x, derive(2, "a")))
    assert torch.equal(torch.get_rng_state(), state)
