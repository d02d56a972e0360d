"""A folder as an audit leaves it: audit.json and pictures, made up but of a plausible kind."""

from __future__ import annotations

import copy
import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LABELS = ("Sneaker", "Pullover", "Bag", "Sandal", "Coat")
FRAMES = 20
STEPS = [75 * i for i in range(FRAMES)]
# (attack, defense, threat) -> how much of the image is seen, in [0, 1]
SEEN = {
    "none": {"adaptive": 0.85},
    "norm": {"adaptive": 0.62},
    "fedbn": {"adaptive": 0.55},
    "channel": {"key-unknown": 0.12, "adaptive": 0.5, "key-shared": 0.58},
    "pad": {"key-unknown": 0.02, "adaptive": 0.03, "key-shared": 0.4},
}
STRENGTH = {"inverting-gradients": 1.0, "dlg": 0.55, "shadow": 0.8}
CONTROLS = ("none", "norm", "fedbn", "key-shared", "floor")
FLOOR = 0.3


def write_fake_audit(folder: Path, **changes: Any) -> dict[str, Any]:
    """Writes the audit, with top-level entries replaced by ``changes``, and returns it."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    files, pictures = _pictures()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    rng = np.random.default_rng(0)
    summary, rows = _grid(rng)
    audit = {
        "format": "fedkl-audit",
        "version": 1,
        "config": {
            "dataset": "fashion-mnist",
            "model": "lenet",
            "effort": "standard",
            "images": 20,
            "training": {"lr": 0.05, "momentum": None, "augment": False},
            "attacks": list(STRENGTH),
        },
        "command": "fedkl audit --run runs/kl --defenses channel,pad --out runs/audit",
        "versions": {"fedkl": "0.1.0", "torch": "2.9.0", "python": "3.11.7"},
        "data": "Fashion-MNIST, 20 test images, 32×32, seed 0",
        "cost": "41 min on 2 cores",
        "verdict": _verdict(summary),
        "threats": _threats(),
        "controls": list(CONTROLS),
        "accuracy": {
            "none": {"own_key": 0.872, "wrong_key": None, "no_lock": 0.872},
            "norm": {"own_key": 0.881, "wrong_key": None, "no_lock": 0.881},
            "fedbn": {"own_key": 0.856, "wrong_key": None, "no_lock": 0.31},
            "channel": {"own_key": 0.874, "wrong_key": 0.2, "no_lock": 0.14},
            "pad": {"own_key": 0.851, "wrong_key": 0.22, "no_lock": 0.1},
        },
        "summary": summary,
        "rows": rows,
        "pictures": copy.deepcopy(pictures),
        "skipped": [{"cell": "final_pad_ggl", "reason": "no generator for 1 channel"}],
        "caveats": ["The undefended control is nearly untrained."],
        "left_out": [{"cell": "final_pad_peel", "victim": 3, "reason": "a gradient of zero"}],
        "certificate": {
            "pixels": 3072,
            "tolerance": 1e-6,
            "defenses": [
                {"defense": "channel", "directions": 3071, "bits": 8123.4},
                {"defense": "pad", "directions": 0, "bits": 0.7},
            ],
        },
    } | changes
    (folder / "audit.json").write_text(json.dumps(audit), encoding="utf-8")
    return audit


def _grid(rng: np.random.Generator) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    summary, rows = [], []
    for attack, strength in STRENGTH.items():
        for defense, threats in SEEN.items():
            for threat, seen in threats.items():
                place = _place(attack, defense, threat)
                values = rng.normal(0.72 * seen * strength - 0.05, 0.07, 20)
                rows += [
                    place
                    | {
                        "image": i,
                        "seed": 0,
                        "advantage": round(float(x), 4),
                        "ssim": round(float(x) + FLOOR, 4),
                    }
                    for i, x in enumerate(values)
                ]
                summary.append(place | _figures(values, seen * strength))
    return summary, rows


def _place(attack: str, defense: str, threat: str) -> dict[str, Any]:
    role = "control" if defense in CONTROLS or threat in CONTROLS else "defense"
    return {
        "attack": attack,
        "defense": defense,
        "threat": threat,
        "stage": "final",
        "batch": 1,
        "steps": 1,
        "observations": 1,
        "presentations": 1,
        "role": role,
    }


def _figures(values: Any, seen: float) -> dict[str, Any]:
    def interval(mean: float, half: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - half, "high": mean + half}

    mean = float(np.mean(values))
    half = 1.96 * float(np.std(values)) / len(values) ** 0.5
    leaks = mean - half > 0.05
    return {
        "n": len(values),
        "ssim": interval(FLOOR + mean, half),
        "ssim_aligned": interval(FLOOR + 0.05 + mean, half),
        "floor_ssim_aligned": interval(FLOOR + 0.05, 0.03),
        "mse": interval(0.08 - 0.07 * seen, 0.01),
        "psnr": interval(11 + 14 * seen, 1.5),
        "lpips": {"mean": None, "low": None, "high": None},
        "advantage": interval(mean, half),
        "identified": interval(max(0.01, min(1.0, 1.6 * seen)), 0.01),
        "floor_identified": interval(0.013, 0.01),
        "success": interval(min(1.0, seen), 0.05),
        "works": {"advantage": True, "identified": True},
        "verdict": "leaks" if leaks else "inconclusive" if mean > 0 else "holds",
        "reason": "The lower bound is above +0.05." if leaks else "The floor is not beaten.",
    }


def _verdict(summary: list[dict[str, Any]]) -> dict[str, Any]:
    def index(attack: str, defense: str) -> int:
        found = (attack, defense, "adaptive")
        return next(
            i for i, x in enumerate(summary) if (x["attack"], x["defense"], x["threat"]) == found
        )

    return {
        "overall": "leaks",
        "defenses": {
            "channel": {
                "verdict": "leaks",
                "worst": index("inverting-gradients", "channel"),
                "reason": "An attacker who frees scale and shift sees what the key holder sees.",
            },
            "pad": {
                "verdict": "holds",
                "worst": str(index("shadow", "pad")),
                "reason": "No attack is better than the floor, and each works with the key.",
            },
        },
    }


def _threats() -> dict[str, Any]:
    return {
        "key-unknown": {
            "name": "key-unknown",
            "words": "Knows the lock's weights, guesses a key.",
            "labels": False,
            "key": False,
        },
        "adaptive": {
            "name": "adaptive",
            "words": "Knows everything but the key and the private tensors, and searches for both.",
            "labels": False,
            "key": False,
        },
        "key-shared": {
            "name": "key-shared",
            "words": "Holds the key and the lock.",
            "labels": False,
            "key": True,
        },
    }


@functools.cache
def _pictures() -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    rng = np.random.default_rng(1)
    files: dict[str, bytes] = {}
    found = []
    for image, label in enumerate(LABELS):
        truth = _drawing(rng)
        floor = 0.5 + 0.5 * (_smooth(truth) - 0.5)
        files[f"pictures/truth-{image}.png"] = _png(truth)
        files[f"pictures/floor-{image}.png"] = _png(floor)
        for attack, strength in STRENGTH.items():
            for defense, threats in SEEN.items():
                for threat, seen in threats.items():
                    found.append(
                        _picture(files, rng, truth, image, label, attack, defense, threat)
                        | {"ssim": round(min(0.98, seen * strength + 0.02), 3)}
                        | {"identified": seen * strength > 0.3}
                    )
    return files, found


def _picture(
    files: dict[str, bytes],
    rng: np.random.Generator,
    truth: Any,
    image: int,
    label: str,
    attack: str,
    defense: str,
    threat: str,
) -> dict[str, Any]:
    seen = SEEN[defense][threat] * STRENGTH[attack]
    noise = np.clip(rng.normal(0.5, 0.25, truth.shape), 0, 1)
    stages = [seen * (1 - np.exp(-4 * i / FRAMES)) for i in range(FRAMES)]
    frames = [np.clip((1 - s) * noise + s * truth, 0, 1) for s in stages]
    name = f"pictures/{attack}-{defense}-{threat}-{image}"
    files[f"{name}.png"] = _png(frames[-1])
    filmed = attack == "inverting-gradients" and image < 2
    if filmed:
        files[f"{name}-frames.png"] = _png(np.concatenate(frames, axis=1))
    return {
        "attack": attack,
        "defense": defense,
        "threat": threat,
        "stage": "final",
        "image": image,
        "seed": 0,
        "label": label,
        "truth": f"pictures/truth-{image}.png",
        "floor": f"pictures/floor-{image}.png",
        "reconstruction": f"{name}.png",
        "sprite": f"{name}-frames.png" if filmed else None,
        "frames": FRAMES,
        "iterations": STEPS,
        "losses": [float(np.exp(-6 * s)) * 0.9 + 0.001 for s in stages],
        "ssims": [round(min(0.98, s + 0.02), 3) for s in stages],
    }


def _drawing(rng: np.random.Generator) -> Any:
    y, x = np.mgrid[0:32, 0:32] / 31
    drawing = np.full((32, 32), rng.uniform(0, 0.15))
    for _ in range(5):
        cx, cy, rx, ry = rng.uniform(0.2, 0.8, 2).tolist() + rng.uniform(0.1, 0.35, 2).tolist()
        inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
        drawing[inside] = rng.uniform(0.3, 1.0)
    return drawing


def _smooth(image: Any) -> Any:
    for _ in range(40):
        image = (image + sum(np.roll(image, s, a) for s in (1, -1) for a in (0, 1))) / 5
    return image


def _png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((255 * pixels).round().astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()
