"""The tables of results/leakage.md."""

from __future__ import annotations

from typing import Any

from cells import table


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
