"""(a) A training step of a locked model against the same model unlocked: time and memory.

Time: copies of one model (unlocked, lock at the first norm, locks at all, a pad at all) take a step
on the same batch in turns, in one process on one thread. The pad stands at ResNet-20 only, where it
is also compiled and taken against the compiled unlocked network. Memory: the most bytes that torch
holds at once.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from common import Note, Row, ask, ratio_row

# model, batch, image size; ResNet-18 also at a batch where its 22 million weights weigh more
SHAPES = (("resnet20", 64, 32), ("resnet18", 64, 64), ("resnet18", 16, 64))
LAYERS = {"first": "<= 1.02", "all": "<= 1.05"}
# model, batch, image size; every arm's name with "compiled" runs under torch.compile
PAD_SHAPES = (("resnet20", 64, 32), ("resnet20", 64, 16))
PAD = {("pad", "unlocked"): "<= 1.20", ("pad, compiled", "unlocked, compiled"): "<= 1.08"}
WARM_UP = 3


def measure(repeats: int, quick: bool, note: Note) -> list[Row]:
    """Rows of part (a): about 5 s per repeat on a quiet core, and a minute besides."""
    rows = []
    for model, batch, size in SHAPES[:1] if quick else SHAPES:
        shape = {"model": model, "batch": batch, "size": size}
        note(f"(a) {model}, batch of {batch}, {size}×{size}: {repeats} steps of each arm in turns")
        rows += _time_rows(shape, ask("steps.py", {**shape, "role": "time", "repeats": repeats}))
        note(f"(a) {model}, batch of {batch}, {size}×{size}: peak memory")
        rows += _memory_rows(shape, ask("steps.py", {**shape, "role": "memory"}))
    for model, batch, size in PAD_SHAPES[-1:] if quick else PAD_SHAPES:
        shape = {"model": model, "batch": batch, "size": size}
        note(f"(a) pad: {_title(shape)}: compiling (minutes), then {repeats} steps in turns")
        rows += _pad_rows(shape, ask("steps.py", {**shape, "role": "pad", "repeats": repeats}))
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


def _pad_rows(shape: Mapping[str, Any], found: Mapping[str, Any]) -> list[Row]:
    sizes = found["parameters"]
    return [
        ratio_row(
            "a",
            f"step with {over} / {under}, {_title(shape)}",
            (over, under),
            found["wall"],
            cpu=found["cpu"],
            target=target,
            note=f"{sizes[over]:,} against {sizes[under]:,} parameters",
        )
        for (over, under), target in PAD.items()
    ]


def _memory_rows(shape: Mapping[str, Any], peaks: Mapping[str, int]) -> list[Row]:
    rows = []
    for arm, target in LAYERS.items():
        samples = {f"{name} [bytes]": [peaks[name]] for name in (arm, "unlocked")}
        note = f"{peaks[arm] / 1e6:.0f} against {peaks['unlocked'] / 1e6:.0f} MB"
        what = f"peak memory of a step with lock {arm!r} / unlocked, {_title(shape)}"
        figure = peaks[arm] / peaks["unlocked"]
        rows.append(Row("a", what, figure, None, None, target, samples, note))
    return rows


def _arm(settings: Mapping[str, Any], arm: str) -> Any:
    """A function that takes one training step, its model and its optimizer."""
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
    name, _, compiled = arm.partition(", ")
    if name == "pad":
        model = lock(model, Key.generate(), scheme="pad", example=x[:2])
    elif name != "unlocked":
        model = lock(model, Key.generate(), layers=name, example=x[:2])
    model.train()
    forward = torch.compile(model, fullgraph=True) if compiled else model
    # The optimizer that the federation's clients use, so that the lock pays for its momentum too.
    optimizer = make_optimizer(model.parameters(), 0.01, TrainingConfig())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(forward(x), y).backward()
        optimizer.step()

    return step, model, optimizer


def _time(settings: Mapping[str, Any]) -> dict[str, Any]:
    return _in_turns(settings, ("unlocked", *LAYERS))


def _time_pad(settings: Mapping[str, Any]) -> dict[str, Any]:
    return _in_turns(settings, tuple(arm for pair in PAD for arm in pair))


def _in_turns(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    arms = {arm: _arm(settings, arm) for arm in names}
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
        "parameters": {a: sum(p.numel() for p in m.parameters()) for a, (_, m, _) in arms.items()},
    }


def _peak(settings: Mapping[str, Any], arm: str) -> int:
    """Bytes that torch holds at the height of a step: the model, momentum, gradients, activations.

    Counted by torch's profiler, allocation by allocation: it is exact and the same every time,
    where the resident size of a process is off by what malloc keeps for later.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    step, model, optimizer = _arm(settings, arm)
    step()
    momenta = [slot for slots in optimizer.state.values() for slot in slots.values()]
    # The profiler misses the end of what was there before it: gradients go before it begins.
    optimizer.zero_grad(set_to_none=True)
    held = [*model.parameters(), *model.buffers(), *momenta]
    start = sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "torch's profiler recorded no allocation"
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return start + max(itertools.accumulate(changes))


def _memory(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {arm: _peak(settings, arm) for arm in ("unlocked", *LAYERS)}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    roles = {"time": _time, "memory": _memory, "pad": _time_pad}
    print(json.dumps(roles[given["role"]](given)))
