"""(a) A training step of a locked model against the same model unlocked: time and memory.

Time: three copies of one model (unlocked, lock at the first norm, locks at all) take a step on the
same batch in turns, in one process on one thread. Memory: each copy trains in a process of its own.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

from common import Note, Row, ask, paired, ratio_row

# model, batch, image size; ResNet-18 also at a batch where its 22 million weights weigh more
SHAPES = (("resnet20", 64, 32), ("resnet18", 64, 64), ("resnet18", 16, 64))
LAYERS = {"first": "<= 1.02", "all": "<= 1.05"}
WARM_UP = 3


def measure(repeats: int, quick: bool, note: Note) -> list[Row]:
    """Rows of part (a): about 2 s per repeat on a quiet core, and a minute for memory."""
    rows = []
    for model, batch, size in SHAPES[:1] if quick else SHAPES:
        shape = {"model": model, "batch": batch, "size": size}
        note(f"(a) {model}, batch of {batch}, {size}×{size}: {repeats} steps of each arm in turns")
        rows += _time_rows(shape, ask("steps.py", {**shape, "role": "time", "repeats": repeats}))
        note(f"(a) {model}, batch of {batch}, {size}×{size}: peak memory")
        rows += _memory_rows(shape, 1 if quick else 3)
    return rows


def _title(shape: Mapping[str, Any]) -> str:
    return f"{shape['model']}, batch {shape['batch']}, {shape['size']}×{shape['size']}"


def _time_rows(shape: Mapping[str, Any], found: Mapping[str, Any]) -> list[Row]:
    sizes = found["parameters"]
    return [
        ratio_row(
            "a",
            f"step with lock {layers!r} / unlocked, {_title(shape)}",
            (layers, "unlocked"),
            found["wall"],
            cpu=found["cpu"],
            target=target,
            note=f"{sizes[layers]:,} against {sizes['unlocked']:,} parameters",
        )
        for layers, target in LAYERS.items()
    ]


def _memory_rows(shape: Mapping[str, Any], repeats: int) -> list[Row]:
    """Growth of the resident peak over what was there before the model was built."""
    arms = ("unlocked", *LAYERS)
    peaks: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm in arms:
            peaks[arm].append(ask("steps.py", {**shape, "role": "memory", "arm": arm})["peak"])
    rows = []
    for arm in LAYERS:
        figure, interval = paired(peaks[arm], peaks["unlocked"])
        samples = {f"{name} [bytes]": peaks[name] for name in (arm, "unlocked")}
        extra = statistics.median(peaks[arm]) - statistics.median(peaks["unlocked"])
        note = f"{extra / 1e6:+.0f} MB; weights, gradients, momentum and activations"
        what = f"peak memory of training with lock {arm!r} / unlocked, {_title(shape)}"
        rows.append(Row("a", what, figure, interval, None, "", samples, note))
    return rows


def _arm(settings: Mapping[str, Any], arm: str) -> Any:
    """A function that takes one training step, and the model it is of."""
    import torch
    from torch import nn

    from fedkl import Key, lock
    from fedkl.federation import TrainingConfig
    from fedkl.federation.optim import make_optimizer
    from fedkl.models import build
    from fedkl.rng import derive

    torch.set_num_threads(1)
    batch, size = settings["batch"], settings["size"]
    generator = derive(0, "benchmark")
    x = torch.rand(batch, 3, size, size, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    model = build(settings["model"], num_classes=10, image_size=size, generator=derive(0, "model"))
    if arm != "unlocked":
        model = lock(model, Key.generate(), layers=arm, example=x[:2])
    model.train()
    # The optimizer that the federation's clients use, so that the lock pays for its momentum too.
    optimizer = make_optimizer(model.parameters(), 0.01, TrainingConfig())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step, model


def _time(settings: Mapping[str, Any]) -> dict[str, Any]:
    arms = {arm: _arm(settings, arm) for arm in ("unlocked", *LAYERS)}
    wall: dict[str, list[float]] = {arm: [] for arm in arms}
    cpu: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(WARM_UP + settings["repeats"]):
        for arm in list(arms) if number % 2 else list(arms)[::-1]:
            start, spent = time.perf_counter(), time.process_time()
            arms[arm][0]()
            wall[arm].append(time.perf_counter() - start)
            cpu[arm].append(time.process_time() - spent)
    return {
        "wall": {arm: values[WARM_UP:] for arm, values in wall.items()},
        "cpu": {arm: values[WARM_UP:] for arm, values in cpu.items()},
        "parameters": {a: sum(p.numel() for p in m.parameters()) for a, (_, m) in arms.items()},
    }


def _memory(settings: Mapping[str, Any]) -> dict[str, Any]:
    # Importing and a first step of a tiny model load the libraries, which are not the model's.
    _arm({**settings, "model": "resnet20", "batch": 2, "size": 8}, "unlocked")[0]()
    before = _peak()
    step, _ = _arm(settings, settings["arm"])
    for _ in range(3):
        step()
    return {"peak": _peak() - before}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps({"time": _time, "memory": _memory}[given["role"]](given)))
