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
    """Writes an image (C, H, W) in [0, 1], C 1 or 3, as an 8-bit PNG (atomic)."""
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
        row = rows[i]
        stem = f"pictures/{name}-{row['image']}"
        entry = {
            **{k: row[k] for k in ("attack", "defense", "threat", "stage", "image", "seed")},
            "label": class_names[row["label"]],
            "ssim": row["ssim"],
            "identified": row["identified"],
            "truth": f"pictures/truth-{row['image']}.png",
            "floor": f"pictures/floor-{row['image']}.png",
            "reconstruction": f"{stem}.png",
            "sprite": None,
            "frames": 0,
            "iterations": list(one.iterations),
            "losses": [number(loss) for loss in one.losses],
            "ssims": [],
        }
        save_png(truth.images[i], folder / entry["truth"])
        save_png(truth.floor[i], folder / entry["floor"])
        save_png(images[i], folder / entry["reconstruction"])
        # A film is of the first image of the attack's own order; another must not stand in for it.
        own = bool(torch.equal(one.images[0, 0].to(images), images[i]))
        if own and one.frames is not None and len(one.frames) > 1:
            frames = one.frames
            save_png(torch.cat(list(frames), dim=-1), folder / f"{stem}-frames.png")
            entry["sprite"], entry["frames"] = f"{stem}-frames.png", len(frames)
            target = truth.images[i].expand_as(frames)
            entry["ssims"] = metrics.ssim(frames, target).tolist()
        entries.append(entry)
    return entries
