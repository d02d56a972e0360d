"""Cells of a study: run once each, in parallel processes, kept on disk, skipped when done."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

PACKAGES = ("fedkl", "torch", "torchvision", "numpy")


def provenance(command: str) -> dict[str, Any]:
    """The command, versions, commit, machine and time of a result."""
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, one thread per process",
    }


def commit() -> str:
    """The commit of the work tree, with ``+changes`` where the sources differ from it."""
    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "studies")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else "")


def run_cells(
    cells: Mapping[str, Any],
    work: Callable[[str, Any], dict[str, Any]],
    folder: Path,
    *,
    processes: int,
    costs: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """Runs ``work(name, cell)`` for every cell without a result in ``folder``.

    Args:
        cells: Name to cell; the name is the file name of the result.
        work: A module-level function that returns plain data.
        folder: One JSON file per finished cell.
        processes: Cells at a time.
        costs: Expected seconds of each cell, for the estimate of the time left.

    Returns:
        Every cell's result by name.

    Raises:
        Exception: What the first cell that failed had raised, once all others are done and kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = [name for name in cells if not (folder / f"{name}.json").exists()]
    say(f"{len(cells)} cells, {len(cells) - len(todo)} done already")
    started, spent = time.monotonic(), 0.0
    failed: list[BaseException] = []
    # The longest first, so that the processes finish together.
    todo.sort(key=lambda name: -costs[name])
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(work, name, cells[name]): name for name in todo}
        for done, future in enumerate(as_completed(futures), 1):
            name = futures[future]
            spent += costs[name]
            if (error := future.exception()) is not None:
                failed.append(error)
                say(f"{name} failed, the others go on: {error!r}")
                continue
            write(folder / f"{name}.json", future.result())
            left = sum(costs[n] for n in todo) - spent
            pace = (time.monotonic() - started) / max(spent, 1e-9)
            say(f"[{done}/{len(todo)}] {name}; about {left * pace / 60:.0f} min left")
    if failed:
        raise failed[0]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in cells}


def write(path: Path, data: Any) -> None:
    """Writes JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(path)


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(header)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the settings of ``over``, section by section."""
    found = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = merged(found[name], value) if both else value
    return found
