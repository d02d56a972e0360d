"""(d) Peak memory of a federation of 10 to 10,000 clients, up to 20 of them sampled a round.

Every federation runs three rounds in a process of its own: LeNet, defense ``channel``, four images
a client, IID, one worker, no evaluation. The peak is the resident size of the whole process.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import Note, Row, ask
from rounds import Enough

CLIENTS = (10, 100, 1_000, 10_000)
SAMPLED, IMAGES, ROUNDS = 20, 4, 3
WITHIN = "<= 1.10"


def measure(repeats: int, quick: bool, note: Note) -> list[Row]:
    """The row of part (d): about 10 s per federation."""
    counts = CLIENTS[:2] if quick else CLIENTS
    peaks: dict[int, list[float]] = {count: [] for count in counts}
    growth: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(min(repeats, 3)):
        for count in counts:
            found = ask("memory.py", {"clients": count})
            peaks[count].append(found["peak"])
            growth[count].append(found["peak"] - found["loaded"])
            note(f"(d) {count} clients: {found['peak'] / 2**20:.0f} MiB, {found['wall']:.1f} s")
    return [
        _row("peak memory", peaks, WITHIN, "resident size of the process"),
        _row("growth of memory", growth, "", "peak minus what was resident with libraries loaded"),
    ]


def _row(what: str, values: Mapping[int, list[float]], target: str, note: str) -> Row:
    medians = {count: sorted(found)[len(found) // 2] for count, found in values.items()}
    figure = max(medians.values()) / min(medians.values())
    samples = {f"{count} clients [bytes]": found for count, found in values.items()}
    text = ", ".join(f"{c:,}: {m / 2**20:.0f} MiB" for c, m in medians.items())
    title = f"{what}, largest / smallest of {', '.join(f'{c:,}' for c in medians)} clients"
    return Row("d", title, figure, None, None, target, samples, f"{note}; {text}")


def _federate(settings: Mapping[str, Any]) -> dict[str, Any]:
    from fedkl.federation import Event, config_from, run

    loaded, start = _peak(), time.perf_counter()
    clients = settings["clients"]
    config = config_from(
        {
            "data": {"samples": IMAGES},
            "defense": {"name": "channel"},
            "federation": {
                "clients": clients,
                "fraction": min(1.0, SAMPLED / clients),
                "rounds": ROUNDS,
            },
            "evaluation": {"every": 0},
        }
    )
    done = 0

    def on_event(event: Event) -> None:
        nonlocal done
        done += event.kind == "client"
        if event.kind == "round" and event.round == ROUNDS:
            raise Enough

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        run(config, Path(folder) / "run", on_event=on_event)
    assert done == ROUNDS * min(SAMPLED, clients)
    return {"peak": _peak(), "loaded": loaded, "wall": time.perf_counter() - start}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(_federate(json.loads(sys.argv[1]))))
