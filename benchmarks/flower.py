"""(c) The engine against Flower's simulation engine, on the same work and both cores.

Flower runs one client per core at a time, the engine two workers. Its app keeps data and model
between calls, as Flower's own examples do; one that loads them in every call takes several times
as long, and would measure the loading.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from common import HERE, ROOT, Note, Row, ask, ratio_row

CLIENTS, IMAGES, ROUNDS = 100, 180, 3
TARGET = ">= 10"
PYTHON = ROOT / ".venv-bench" / "bin" / "python"


def measure(repeats: int, quick: bool, note: Note) -> list[Row]:
    """Rows of part (c): about a minute and a half per repeat, of which at most three are taken."""
    if (problem := _set_up(note)) is not None:
        return [Row("c", "Flower / engine", None, target=TARGET, note=f"not available: {problem}")]
    work = {"clients": CLIENTS, "images": IMAGES // 10 if quick else IMAGES, "rounds": ROUNDS}
    found: dict[str, list[dict[str, Any]]] = {"Flower": [], "engine": []}
    for number in range(min(repeats, 3)):
        for name in list(found) if number % 2 == 0 else list(found)[::-1]:
            found[name].append(_timed(name, work))
            last = found[name][-1]
            rounds = ", ".join(f"{seconds:.1f}" for seconds in last["rounds"])
            note(f"(c) {name}: {last['wall']:.1f} s in all, later rounds {rounds} s")
    shape = f"{CLIENTS} clients × {work['images']} images"
    whole = {name: [run["wall"] for run in runs] for name, runs in found.items()}
    later = {name: [s for run in runs for s in run["rounds"]] for name, runs in found.items()}
    return [
        ratio_row(
            "c",
            f"Flower / engine, {shape}, {ROUNDS} rounds from start to exit",
            ("Flower", "engine"),
            whole,
            target=TARGET,
            note=f"imports, loading and start of processes included; {_agreement(found)}",
        ),
        ratio_row(
            "c",
            f"Flower / engine, {shape}, a round after the first",
            ("Flower", "engine"),
            later,
            target=TARGET,
            note="everything loaded and warm on both sides",
        ),
    ]


def _agreement(found: Mapping[str, list[dict[str, Any]]]) -> str:
    a, b = (found[name][0]["weights"] for name in ("Flower", "engine"))
    apart = max(abs(x - y) for x, y in zip(a, b, strict=True))
    return f"final weights differ by at most {apart:.1e}"


def _timed(name: str, work: Mapping[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    if name == "engine":
        found = ask("rounds.py", {**work, "role": "whole", "workers": 2})
    else:
        found = ask("flower_app.py", work, str(PYTHON))
        found["rounds"] = found["rounds"][1:]
    return {**found, "wall": time.perf_counter() - start}


def _set_up(note: Note) -> str | None:
    """Makes .venv-bench where it is missing. Why it could not, or None."""
    # Ray's processes import the app by name; neither engine is to report home meanwhile.
    path = os.environ.get("PYTHONPATH", "")
    if str(HERE) not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(HERE), path) if p)
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    note("(c) Flower's environment, .venv-bench (installed once, 1 to 3 minutes)")
    done = subprocess.run([str(HERE / "setup.sh")], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return f"benchmarks/setup.sh failed ({lines[-1]})"
