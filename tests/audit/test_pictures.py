"""Pictures: a film is of the image that stands beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedkl.attacks import Reconstruction
from fedkl.audit.measure import Truth
from fedkl.audit.pictures import save_pictures, save_png


def pictured(folder: Path, order: list[int]) -> dict[str, object]:
    """The entry of one victim with a batch of two, its images put in ``order``."""
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = torch.stack([x[0] * 0, x[0]])
    found = Reconstruction(
        images=x[None], labels=torch.zeros(1, 2), frames=frames, iterations=(0, 9), losses=(1, 0)
    )
    truth = Truth(torch.arange(2), x, torch.zeros(2), x, torch.zeros(2, 1), x, torch.arange(2), {})
    facts = {"attack": "a", "defense": "none", "threat": "open", "stage": "final", "seed": 0}
    rows = [{**facts, "image": i, "label": 0, "ssim": 1.0, "identified": True} for i in range(2)]
    (entry,) = save_pictures(
        folder, "cell", [found], x[order], truth, rows, count=1, class_names=("zero",)
    )
    return entry


def test_film_of_the_first_image(tmp_path: Path) -> None:
    entry = pictured(tmp_path, [0, 1])
    assert entry["frames"] == len(entry["ssims"]) == 2  # type: ignore[arg-type]
    assert (tmp_path / str(entry["sprite"])).is_file()


def test_no_film_of_another_image_of_the_batch(tmp_path: Path) -> None:
    entry = pictured(tmp_path, [1, 0])
    assert (entry["sprite"], entry["frames"], entry["ssims"]) == (None, 0, [])
    assert (tmp_path / str(entry["reconstruction"])).is_file()


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_other_numbers_of_channels_stand_side_by_side(tmp_path: Path, channels: int) -> None:
    """Two and four were taken for transparency, others were an error after the attack."""
    image = torch.rand(channels, 4, 6, generator=torch.Generator().manual_seed(0))
    save_png(image, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.mode, picture.size) == ("L", (6 * channels, 4))
        seen = np.array(picture)
    for number, channel in enumerate(image):
        expected = (channel * 255).round().numpy()
        assert (seen[:, 6 * number : 6 * number + 6] == expected).all()
