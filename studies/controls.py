"""Do the attacks work where they must? `make reproduce-leakage`, first half.

An attack that fails everywhere proves nothing about a defense, so every attack is first carried
out where the literature says it succeeds. Victims, fixed by seed 0: 20 crops of photographs that
scikit-image ships (3x32x32) and 20 Fashion-MNIST test images (1x32x32), one image and one step
each, undefended. Model: the LeNet of "Deep Leakage from Gradients" with weights uniform in ±0.5;
for the last two rows the same model after a few epochs of ordinary training.

Restarts are chosen by the attack's own loss. SSIM is the Gaussian one. Everything is on one
thread; every cell is kept, and an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cells import provenance, run_cells, say, table, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from fedkl import metrics
from fedkl.attacks import DLG, GGL, GRNN, IDLG, Attack, InvertingGradients, cached_generator
from fedkl.data import DataBundle
from fedkl.federation import config_from
from fedkl.federation.session import load_data
from fedkl.models import build
from fedkl.observation import OPEN, Observation, Training
from fedkl.rng import derive

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "retina")  # in scikit-image's wheel
COUNT, SIZE, CLASSES = 20, 32, 10
DLG_STEPS = {"photos": (2500, 6), "fashion": (600, 2)}  # evaluations of L-BFGS, restarts
EPOCHS, IMAGES, RATE = 8, 18_000, 0.05  # of the trained victim


@dataclass(frozen=True)
class Cell:
    """One attack on one set of victims.

    ``seconds`` is what it takes on one idle core. ``target`` reads (figure, least value).
    """

    attack: Callable[[Path], Attack]
    data: str
    target: tuple[str, float] | None
    seconds: float
    images: int = COUNT
    trained: bool = False


def _dlg(kind: type[DLG] | type[IDLG], data: str) -> Callable[[Path], Attack]:
    iterations, restarts = DLG_STEPS[data]
    return lambda _: kind(iterations=iterations, restarts=restarts)


def _adam(iterations: int, restarts: int = 1, tv: float = 1e-6) -> Callable[[Path], Attack]:
    return lambda _: InvertingGradients(
        iterations=iterations, restarts=restarts, signed=False, tv=tv
    )


def _newton(_: Path) -> Attack:
    return InvertingGradients(iterations=1500, lr=1.0, tv=0.0, signed=False, optimizer="l-bfgs")


def _signed(_: Path) -> Attack:
    """Step and decay as published; total variation scaled to ours, which is a mean."""
    return InvertingGradients(iterations=2000)


def _ggl(scratch: Path) -> Attack:
    public = bundle().public
    images, labels = public.batch(torch.arange(len(public)))
    model = cached_generator(
        scratch / "generators", images, labels, CLASSES, steps=2000, generator=derive(0, "images")
    )
    return GGL(model, iterations=150, restarts=2)


SHARE, MEAN, BEYOND = "share of SSIM >= 0.9", "mean SSIM", "aligned SSIM - floor"
CELLS: dict[str, Cell] = {
    f"{name} {data}": Cell(attack, data, target, seconds, images)
    for data in ("photos", "fashion")
    for name, attack, target, seconds, images in (
        ("dlg", _dlg(DLG, data), (SHARE, 0.8), 90, COUNT),
        ("idlg", _dlg(IDLG, data), (SHARE, 0.8), 90, COUNT),
        ("inverting-gradients, L-BFGS", _newton, (MEAN, 0.9), 70, COUNT),
        ("inverting-gradients, Adam", _adam(3000, 2), None, 115, COUNT),
        ("inverting-gradients, signed Adam", _signed, None, 40, COUNT),
        ("grnn", lambda _: GRNN(iterations=1500), (MEAN, 0.9), 75, 5),
    )
} | {
    "inverting-gradients fashion trained": Cell(
        _adam(2500, 2, tv=3e-3), "fashion", (BEYOND, 0.10), 90, trained=True
    ),
    "ggl fashion trained": Cell(_ggl, "fashion", (BEYOND, 0.0), 150, trained=True),
}


@cache
def bundle() -> DataBundle:
    """Fashion-MNIST at 1x32x32."""
    data = {"dataset": "fashion-mnist", "channels": 1, "image_size": SIZE}
    return load_data(config_from({"data": data}))


def photos(count: int) -> tuple[Tensor, Tensor]:
    """Random square crops, a quarter to all of the shorter side, scaled to 32x32; labels 0 ... 9.

    Returns:
        float32 (count, 3, 32, 32) in [0, 1], int64 (count,).
    """
    import skimage.data

    generator = derive(0, "crops")
    crops = []
    for i in range(count):
        photo = getattr(skimage.data, PHOTOS[i % len(PHOTOS)])()
        x = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() / 255
        short = min(x.shape[-2:])
        side = int(short * (0.25 + 0.75 * float(torch.rand((), generator=generator))))
        top, left = (
            int(torch.randint(int(size) - side + 1, (), generator=generator))
            for size in x.shape[-2:]
        )
        crop = x[..., top : top + side, left : left + side]
        crops.append(interpolate(crop, (SIZE, SIZE), mode="area"))
    return torch.cat(crops), torch.arange(count) % CLASSES


def fashion(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """``count`` test images (count, 1, 32, 32), their labels and their rows in the test set."""
    rows = torch.randperm(len(bundle().test), generator=derive(0, "victims"))[:count]
    return *bundle().test.batch(rows), rows


def victim(channels: int) -> nn.Module:
    """The paper's LeNet with every weight and bias uniform in ±0.5."""
    generator = derive(0, "model", channels)
    model = build(
        "lenet", num_classes=CLASSES, channels=channels, image_size=SIZE, generator=generator
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return model


def train(model: nn.Module) -> float:
    """A few epochs of SGD with momentum, in place.

    Returns:
        Accuracy on 2,000 test images, in [0, 1].
    """
    images, labels = bundle().train.batch(torch.arange(IMAGES))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, nesterov=True)
    for epoch in range(EPOCHS):
        order = torch.randperm(IMAGES, generator=derive(0, "order", epoch))
        for rows in order.split(64):
            optimizer.zero_grad()
            cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    x, y = bundle().test.batch(torch.arange(2000))
    with torch.no_grad():
        return metrics.accuracy(model(x), y)


def observations(model: nn.Module, x: Tensor, y: Tensor) -> list[Observation]:
    """What one client per image sends: the gradient of one example."""
    found = []
    for i in range(len(x)):
        model.zero_grad(set_to_none=True)
        cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    return [
        Observation(
            model=model,
            kind="gradient",
            changes=(change,),
            image_shape=(int(x.shape[1]), SIZE, SIZE),
            num_classes=CLASSES,
            training=Training(),
            threat=OPEN,
        )
        for change in found
    ]


def work(name: str, scratch: str) -> dict[str, Any]:
    """One cell, in a process of its own."""
    torch.set_num_threads(1)
    cell, accuracy = CELLS[name], None
    started = time.process_time()
    model = victim(3 if cell.data == "photos" else 1)
    if cell.trained:
        accuracy = train(model)
    x, y, *rows = photos(cell.images) if cell.data == "photos" else fashion(cell.images)
    attack = cell.attack(Path(scratch))
    attacked = time.process_time()
    found = attack.reconstruct(observations(model, x, y), generator=derive(0, "attack", name))
    seconds = time.process_time() - attacked
    images = torch.cat([one.images[0] for one in found]).to(x.dtype)
    labels = torch.cat([one.labels[0] for one in found])
    pictures = Path(scratch) / "pictures" / f"{name}.pt.json"
    write(pictures, {"truth": _bytes(x), "found": _bytes(images), "shape": list(x.shape)})
    return {
        "attack": repr(attack),
        "accuracy": accuracy,
        "seconds": round(seconds, 1),
        "training and preparation [s]": round(attacked - started, 1),
        **_figures(images, x, labels, y, rows[0] if rows else None),
    }


def _bytes(x: Tensor) -> list[int]:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).flatten().tolist()


def _figures(x: Tensor, truth: Tensor, found: Tensor, y: Tensor, rows: Tensor | None) -> Any:
    ssim, aligned = metrics.ssim(x, truth), metrics.ssim_aligned(x, truth)
    figures = {
        "ssim": ssim.tolist(),
        "mse": metrics.mse(x, truth).tolist(),
        "psnr": [v if v < float("inf") else None for v in metrics.psnr(x, truth).tolist()],
        "ssim_aligned": aligned.tolist(),
        "labels right": float((found == y).double().mean()),
    }
    if rows is None:  # photographs of things of their own have no class mean
        return figures
    public, public_labels = bundle().public.batch(torch.arange(len(bundle().public)))
    floor = metrics.class_mean_floor(public, public_labels, y)
    pool, pool_labels = bundle().test.batch(torch.arange(len(bundle().test)))
    decoys = metrics.draw_decoys(y, pool_labels, generator=derive(0, "decoys"), own=rows)
    figures["floor"] = metrics.ssim(floor, truth).tolist()
    figures["floor_aligned"] = metrics.ssim_aligned(floor, truth).tolist()
    figures["identified"] = metrics.identified(x, truth, pool, decoys).tolist()
    figures["floor_identified"] = metrics.identified(floor, truth, pool, decoys).tolist()
    return figures


def judged(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """The figure that the target of a cell is about, and whether it is met."""
    cell, ssim = CELLS[name], figures["ssim"]
    values = {MEAN: _mean(ssim), SHARE: _mean([s >= 0.9 for s in ssim])}
    if "floor_aligned" in figures:
        beyond = zip(figures["ssim_aligned"], figures["floor_aligned"], strict=True)
        values[BEYOND] = _mean([a - b for a, b in beyond])
    met = None
    if cell.target is not None:
        what, least = cell.target
        met = values[what] > least if least == 0 else values[what] >= least
        if name.startswith("ggl"):
            met = met and figures["labels right"] == 1.0
    return {**values, "met": met}


def _mean(values: Any) -> float:
    items = list(values)
    return float(sum(items) / len(items))


def markdown(document: dict[str, Any]) -> str:
    """The table."""
    rows = []
    for name, found in document["cells"].items():
        cell, values = CELLS[name], found["judged"]
        target = "–"
        if cell.target is not None:
            target = f"{cell.target[0]} ≥ {cell.target[1]:g}".replace(">= 0.9 ≥", "≥ 0.9: ≥")
            if cell.target[1] == 0:
                target = "above the floor, label right"
        met = {True: "yes", False: "**missed**", None: "–"}[values["met"]]
        rows.append(
            [
                name,
                str(len(found["ssim"])),
                f"`{found['attack']}`",
                f"{values[MEAN]:.3f}",
                f"{100 * values[SHARE]:.0f} %",
                f"{values[BEYOND]:+.3f}" if BEYOND in values else "–",
                f"{100 * _mean(found['identified']):.0f} %" if "identified" in found else "–",
                f"{_mean(found['mse']):.4f}",
                f"{100 * found['labels right']:.0f} %",
                target,
                met,
                f"{found['seconds']:.0f}",
            ]
        )
    header = ["cell", "images", "attack (iterations × restarts)", "mean SSIM", "SSIM ≥ 0.9"]
    header += ["aligned SSIM − floor", "identified", "MSE", "labels right", "target", "met", "s"]
    accuracy = next(c["accuracy"] for c in document["cells"].values() if c["accuracy"])
    return (
        "# Positive controls: the attacks where they must succeed\n\n"
        f"`{document['command']}` at commit {document['commit']}, {document['date']}. "
        f"{' '.join((__doc__ or '').split(chr(10) * 2)[1].split())} The trained model has "
        f"{100 * accuracy:.1f} % accuracy on 2,000 test images. *Identified*: the true image is "
        "the nearest of 100 of its class (chance: 1 %). *s*: processor seconds of the attack for "
        "all its images.\n\n" + table(header, rows) + "\n\n"
        "![true images above, reconstructions below](controls.png)\n"
    )


def contact_sheet(scratch: Path, path: Path) -> None:
    """True images above, reconstructions below, of every cell, with its name."""
    import numpy as np
    from PIL import Image, ImageDraw

    margin, band = 210, 2 * SIZE + 6
    sheet = Image.new("RGB", (margin + COUNT * SIZE, len(CELLS) * band), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(CELLS):
        draw.text((4, i * band + SIZE - 5), name, fill="black")
        kept = json.loads((scratch / "pictures" / f"{name}.pt.json").read_text())
        for j, kind in enumerate(("truth", "found")):
            x = np.array(kept[kind], dtype=np.uint8).reshape(kept["shape"])
            for k, image in enumerate(np.broadcast_to(x, (len(x), 3, SIZE, SIZE))):
                tile = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
                sheet.paste(tile, (margin + k * SIZE, i * band + j * SIZE))
    sheet.save(path, optimize=True)


def main() -> None:
    """Runs what is missing and writes results/controls.json, .md and .png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "controls")
    args = parser.parse_args()
    costs = {name: cell.seconds + 20 * cell.trained for name, cell in CELLS.items()}
    say(f"cost: about {sum(costs.values()) / 60 / args.processes:.0f} minutes on idle cores")
    found = run_cells(
        dict.fromkeys(CELLS, str(args.scratch)),
        work,
        args.scratch / "cells",
        processes=args.processes,
        costs=costs,
    )
    document = {
        **provenance("python studies/controls.py"),
        "cells": {name: {**found[name], "judged": judged(name, found[name])} for name in CELLS},
    }
    write(args.out / "controls.json", document)
    (args.out / "controls.md").write_text(markdown(document))
    contact_sheet(args.scratch, args.out / "controls.png")
    say(f"wrote {args.out / 'controls.md'}")


if __name__ == "__main__":
    main()
