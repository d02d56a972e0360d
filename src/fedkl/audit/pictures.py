"""PNG files of truth, floor, reconstruction, and of the way there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fedkl import metrics
from fedkl.attacks import Reconstruction
from fedkl.audit.measure import Truth, number
from fedkl.files import make_folder, write_bytes


def save_png(image: Tensor, path: Path) -> None:
    """Writes an image (C, H, W) in [0, 1] as an 8-bit PNG (atomic).

    Grey or color; of other numbers of channels each is grey, side by side: PNG would take the
    second or fourth one for transparency.
    """
    if image.shape[0] not in (1, 3):
        image = torch.cat(list(image), dim=-1)[None]
    pixels = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    data = io.BytesIO()
    picture.save(data, format="PNG", optimize=True)
    write_bytes(path, data.getvalue(), durable=False)


def save_pictures(
    folder: Path,
    name: str,
    found: list[Reconstruction],
    images: Tensor,
    truth: Truth,
    rows: list[dict[str, Any]],
    *,
    count: int,
    class_names: tuple[str, ...],
) -> list[dict[str, Any]]:
    """Pictures of the first image of each of the first ``count`` victims, and facts about them.

    Paths are relative to ``folder``.
    """
    make_folder(folder / "pictures")
    per_victim = len(images) // len(found)
    entries = []
    for victim, one in enumerate(found[:count]):
        i = victim * per_victim
        entry = _entry(name, one, rows[i], class_names)
        save_png(truth.images[i], folder / entry["truth"])
        save_png(truth.floor[i], folder / entry["floor"])
        save_png(images[i], folder / entry["reconstruction"])
        # A film is of the first image of the attack's own order; another must not stand in for it.
        if torch.equal(one.images[0, 0].to(images), images[i]):
            entry |= _film(folder, entry["reconstruction"], one, truth.images[i])
        entries.append(entry)
    return entries


def _entry(
    name: str, one: Reconstruction, row: dict[str, Any], class_names: tuple[str, ...]
) -> dict[str, Any]:
    """What there is to say of a picture, and where it and what stands beside it will be."""
    return {
        **{k: row[k] for k in ("attack", "defense", "threat", "stage", "image", "seed")},
        "label": class_names[row["label"]],
        "ssim": row["ssim"],
        "identified": row["identified"],
        "truth": f"pictures/truth-{row['image']}.png",
        "floor": f"pictures/floor-{row['image']}.png",
        "reconstruction": f"pictures/{name}-{row['image']}.png",
        "sprite": None,
        "frames": 0,
        "iterations": list(one.iterations),
        "losses": [number(loss) for loss in one.losses],
        "ssims": [],
    }


def _film(folder: Path, picture: str, one: Reconstruction, truth: Tensor) -> dict[str, Any]:
    """Writes the frames side by side beside ``picture``; nothing if there are not several."""
    frames = one.frames
    if frames is None or len(frames) < 2:
        return {}
    sprite = f"{picture.removesuffix('.png')}-frames.png"
    save_png(torch.cat(list(frames), dim=-1), folder / sprite)
    ssims = metrics.ssim(frames, truth.expand_as(frames)).tolist()
    return {"sprite": sprite, "frames": len(frames), "ssims": ssims}
