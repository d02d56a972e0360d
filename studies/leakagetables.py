"""The tables and pictures of results/leakage.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cells import table

CONTROLS = ("none", "norm", "fedbn")


def rows_table(rows: list[dict[str, Any]]) -> str:
    """One line per attack, arm and threat."""
    header = ["attack", "arm", "threat", "n", "SSIM", "uniform", "advantage", "identified"]
    header += ["success", "MSE", "PSNR", "paper MSE", "paper PSNR", "labels", "verdict"]
    return table(
        header,
        (
            [
                row["attack"],
                row["arm"],
                row["threat"],
                str(row["n"]),
                f"{_number(row['ssim'])} (floor {_number(row['floor_ssim'])})",
                _number(row["ssim_uniform"]),
                _interval(row["advantage"]),
                _percent(row["identified"]),
                f"{100 * row['success']['mean']:.0f} / {100 * row['floor_success']['mean']:.0f} %",
                _number(row["mse"], 4),
                _number(row["psnr"], 1),
                _number(row["paper_mse"], 1),
                _number(row["paper_psnr"], 1),
                _whole_percent(row["labels_right"]),
                row["verdict"] if row["role"] == "defense" else f"({row['verdict']})",
            ]
            for row in rows
        ),
    )


def _number(value: dict[str, Any], digits: int = 3) -> str:
    return "–" if value["mean"] is None else f"{value['mean']:.{digits}f}"


def _whole_percent(value: dict[str, Any]) -> str:
    return "–" if value["mean"] is None else f"{100 * value['mean']:.0f} %"


def _interval(value: dict[str, Any]) -> str:
    if value["mean"] is None or value["low"] is None:
        return _number(value)
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def _percent(value: dict[str, Any]) -> str:
    return f"{100 * value['mean']:.1f} % [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def contact_sheet(folders: dict[str, Path], path: Path) -> None:
    """Truth, floor, and every cell's reconstructions of the first victims, with their names.

    ``folders`` are audits of one row by arm, the name of its own defense in the picture.
    """
    from PIL import Image, ImageDraw

    pictures: dict[str, list[str]] = {}
    for arm, folder in folders.items():
        audit = folder / "audit.json"
        for p in json.loads(audit.read_text())["pictures"] if audit.exists() else []:
            label = arm if p["defense"] not in CONTROLS else p["defense"]
            for row, what in (
                ("truth", "truth"),
                ("floor", "floor"),
                (f"{p['attack']}: {label}, {p['threat']}", "reconstruction"),
            ):
                files = pictures.setdefault(row, [])
                # The same picture lies in the folder of every arm.
                known = {Path(file).name for file in files}
                if len(files) < 6 and Path(p[what]).name not in known:
                    files.append(str(folder / p[what]))
    size, margin = 48, 300
    sheet = Image.new("RGB", (margin + 6 * (size + 2), len(pictures) * (size + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, files) in enumerate(pictures.items()):
        draw.text((4, i * (size + 2) + size // 2 - 5), row, fill="black")
        for j, file in enumerate(files):
            tile = Image.open(file).convert("RGB").resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + j * (size + 2), i * (size + 2)))
    sheet.save(path, optimize=True)


def minutes(document: dict[str, Any]) -> float:
    """Of one core, over all audits."""
    audits = (one for row in document["audits"].values() for one in row.values())
    return sum(one["seconds"] for one in audits) / 60
