"""How fast and how small: the lock, the engine next to Flower's, an attack next to a peer's.

    python benchmarks/run.py --only a,b,c,d,e --repeats 12 --out results

Parts: (a) a locked training step against an unlocked one; (b) the engine against a bare PyTorch
loop, and two workers against one; (c) the engine against Flower's simulation engine; (d) peak
memory at 10 to 10,000 clients; (e) Inverting Gradients against ``breaching``. Evaluation is off,
every process has one torch thread, arms take turns, and a ratio is the median over neighboring
pairs with a bootstrap 95 % interval. Writes ``benchmark.json`` (raw samples too) and
``benchmark.md``; a missed target is reported as missed, and parts that were not run keep their rows
from before.

Cost: about 25 minutes and 3 GB of memory on two quiet cores.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import memory
import rounds
import steps
from common import ROOT

import attacks
import flower

PARTS = {
    "a": steps.measure,
    "b": rounds.measure,
    "c": flower.measure,
    "d": memory.measure,
    "e": attacks.measure,
}
COST = {"a": 9, "b": 3, "c": 5, "d": 1, "e": 7}  # minutes on a quiet machine
PACKAGES = ("fedkl", "torch", "torchvision", "numpy")


def main() -> None:
    """Runs the parts asked for and writes the results after each."""
    args = _arguments()
    chosen = [part for part in PARTS if part in args.only.split(",")]
    minutes = sum(COST[part] for part in chosen)
    cost = "under a minute a part" if args.quick else f"about {minutes} minutes on two quiet cores"
    _note(f"parts {', '.join(chosen)}, {args.repeats} repeats: {cost}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("benchmark-quick.json" if args.quick else "benchmark.json")
    old = json.loads(path.read_text()) if path.exists() else {"rows": [], "runs": {}}
    for part in chosen:
        start, before = time.monotonic(), os.getloadavg()[0]
        found = PARTS[part](args.repeats, args.quick, _note)
        for row in found:
            _note(f"  {row.what}: {_figure(row.to_dict())}")
        kept = [row for row in old["rows"] if row["part"] != part]
        rows = sorted([*kept, *(r.to_dict() for r in found)], key=lambda row: str(row["part"]))
        run = _facts(args, time.monotonic() - start, before)
        old = {"rows": rows, "runs": {**old["runs"], part: run}}
        _write(path, old)
    _note(f"written: {path} and {path.with_suffix('.md').name}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run (default: all)")
    parser.add_argument("--repeats", type=int, default=12, help="pairs per ratio (default: 12)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, to try it out")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}.")
    if unknown := set(args.only.split(",")) - set(PARTS):
        parser.error(
            f"--only: unknown part {', '.join(sorted(unknown))}; expected {', '.join(PARTS)}."
        )
    return args


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _facts(args: argparse.Namespace, seconds: float, load: float) -> dict[str, Any]:
    """What a reader needs to take the same measurement."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "command": f"python benchmarks/run.py --only {args.only} --repeats {args.repeats}"
        + (" --quick" if args.quick else ""),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "commit": _git("rev-parse", "HEAD") + ("+" if _git("status", "--short", "src") else ""),
        "versions": {"python": platform.python_version(), **versions, "flwr": _flower()},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _flower() -> str | None:
    found = sorted(ROOT.glob(".venv-bench/lib/python*/site-packages/flwr-*.dist-info"))
    return found[-1].name.removeprefix("flwr-").removesuffix(".dist-info") if found else None


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "?")


def _write(path: Path, found: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(_markdown(found["rows"], found["runs"]))


def _figure(row: Mapping[str, Any]) -> str:
    if row["figure"] is None:
        return str(row["note"])
    interval = f" [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]" if row["interval"] else ""
    return f"{row['figure']:.3f}{interval}{_verdict(row)}"


def _verdict(row: Mapping[str, Any]) -> str:
    if row["met"] is None:
        return ""
    return f", target {row['target']} {'met' if row['met'] else 'MISSED'}"


def _markdown(rows: Sequence[Mapping[str, Any]], runs: Mapping[str, Any]) -> str:
    lines = [
        "# Benchmark",
        "",
        "Evaluation off, one torch thread per process. A ratio is the median over neighboring",
        "pairs of an interleaved run, in brackets its bootstrap 95 % interval; a target is judged",
        "by the median of wall time (of resident size for memory). *Processor* is the same ratio",
        "in processor time, which other jobs on the machine disturb less.",
        "",
        "| | ratio | figure | processor | target | met | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figure = "" if row["figure"] is None else f"{row['figure']:.3f}"
        if row["interval"]:
            figure += f" [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]"
        cpu = "" if row["cpu"] is None else f"{row['cpu']:.3f}"
        met = {True: "yes", False: "**missed**", None: ""}[row["met"]]
        cells = [row["part"], row["what"], figure, cpu, row["target"], met, row["note"]]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| | command | commit | load before | cpu | versions |",
        "|---|---|---|---|---|---|",
    ]
    for part, run in sorted(runs.items()):
        versions = ", ".join(f"{name} {v}" for name, v in run["versions"].items() if v)
        cpu = f"{run['cores']} × {run['cpu']}"
        commit = run["commit"][:10] + ("+" if run["commit"].endswith("+") else "")
        cells = [part, f"`{run['command']}`", commit, str(run["load_before"]), cpu, versions]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
