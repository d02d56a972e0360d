"""Made-up rows of audits."""

from __future__ import annotations

from typing import Any

BASE = {
    "attack": "a", "stage": "final", "batch": 1, "steps": 1, "observations": 1, "aggregated": 1,
    "presentations": 1,
    "label": 1, "label_found": 1, "mse": 0.1, "psnr": 10.0, "ssim": 0.5, "ssim_uniform": 0.5,
    "lpips": None, "paper_mse": 1.0, "paper_psnr": 1.0, "floor_ssim": 0.4, "success": False,
    "floor_success": False, "floor_identified": False,
}  # fmt: skip


def rows(
    defense: str, threat: str, n: int, advantage: float, hits: int = 0, noise: float = 0.001
) -> list[dict[str, Any]]:
    """``n`` images with advantages around ``advantage``, ``hits`` of them identified."""
    return [
        {
            **BASE,
            "victim": i,
            "defense": defense,
            "threat": threat,
            "advantage": advantage + noise * (-1) ** i,
            "ssim_aligned": 0.4 + advantage,
            "floor_ssim_aligned": 0.4,
            "identified": i < hits,
        }
        for i in range(n)
    ]


WORKING = [
    row for d in ("channel", "pad") for row in rows(d, "key-shared", 200, 0.3, 150)
]  # fmt: skip
ELSEWHERE = rows("none", "open", 200, 0.3, 150)  # another network than that of a lock
IDLE = rows("channel", "key-shared", 200, 0.0)
