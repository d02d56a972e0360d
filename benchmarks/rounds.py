"""(b) Rounds of the engine against a bare PyTorch loop over the same batches, and two workers.

Three children do a round each in turn: the loop, the engine with one worker, the engine with two.
Only rounds are timed (the engine's checkpoint after each included), not the set-up before the
first nor the test after the last; the first round warms up and is dropped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import Note, Row, Stepper, in_turns, ratio_row

# clients × images, and by how much two workers shall be faster than one
SHAPES = {(3, 6000): ">= 1.3", (100, 180): ">= 1.6"}


def measure(repeats: int, quick: bool, note: Note) -> list[Row]:
    """Rows of part (b): about 6 s per repeat at each of the two shapes."""
    rows = []
    for (clients, images), target in SHAPES.items():
        images = images // 10 if quick else images
        rows += _shape(clients, images, target, repeats, note)
    return rows


def _shape(clients: int, images: int, target: str, repeats: int, note: Note) -> list[Row]:
    shape = f"{clients} clients × {images} images"
    note(f"(b) {shape}, LeNet, batches of 64: loop, 1 worker, 2 workers")
    common = {"clients": clients, "images": images, "rounds": repeats + 1}
    steppers = {
        "loop": Stepper("rounds.py", {**common, "role": "loop"}),
        "1 worker": Stepper("rounds.py", {**common, "role": "engine", "workers": 1}),
        "2 workers": Stepper("rounds.py", {**common, "role": "engine", "workers": 2}),
    }
    answers = in_turns(steppers, repeats + 1, note)
    for stepper in steppers.values():
        stepper.close()
    wall = {name: [a["wall"] for a in got[1:]] for name, got in answers.items()}
    cpu = {name: [a["cpu"] for a in got[1:]] for name, got in answers.items()}
    apart = max(
        abs(x - y)
        for name in ("1 worker", "2 workers")
        for x, y in zip(answers["loop"][-1]["weights"], answers[name][-1]["weights"], strict=True)
    )
    same = f"final weights differ by at most {apart:.1e} from the loop's"
    return [
        ratio_row(
            "b",
            f"engine / bare loop, {shape}",
            ("1 worker", "loop"),
            wall,
            cpu=cpu,
            target="<= 1.05",
            note=same,
        ),
        ratio_row(
            "b", f"1 worker / 2 workers, {shape}", ("1 worker", "2 workers"), wall, target=target
        ),
    ]


def config(clients: int, images: int, rounds: int, workers: int, defense: str = "none") -> Any:
    """The engine's configuration: everything at its default but what is named here."""
    from fedkl.federation import config_from

    return config_from(
        {
            "data": {"samples": images},
            "defense": {"name": defense},
            "federation": {"clients": clients, "rounds": rounds},
            "evaluation": {"every": 0},
            "workers": workers,
        }
    )


class Enough(Exception):
    """Ends a run after its last round, before the test set."""


def engine(settings: Mapping[str, Any]) -> None:
    """Child: a round of the engine per line."""
    from fedkl.federation import Event, run

    rounds = settings["rounds"]
    chosen = config(settings["clients"], settings["images"], rounds, settings["workers"])
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"

        def on_event(event: Event) -> None:
            if event.kind != "round":
                return
            weights = _probe_file(path, event.round) if event.round == rounds else []
            clock.answer(weights)
            if event.round == rounds:
                raise Enough
            clock.wait()

        # The first line starts the set-up, which the first (dropped) sample contains.
        clock.wait()
        with contextlib.suppress(Enough):
            run(chosen, path, on_event=on_event)


def whole(settings: Mapping[str, Any]) -> None:
    """Child: all rounds without waiting; answers with the time of every round but the first."""
    from fedkl.federation import Event, run

    rounds = settings["rounds"]
    ends: list[float] = []
    chosen = config(settings["clients"], settings["images"], rounds, settings["workers"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"

        def on_event(event: Event) -> None:
            if event.kind == "round":
                ends.append(time.perf_counter())
                if event.round == rounds:
                    raise Enough

        with contextlib.suppress(Enough):
            run(chosen, path, on_event=on_event)
        weights = _probe_file(path, rounds)
    later = [b - a for a, b in itertools.pairwise(ends)]
    print(json.dumps({"rounds": later, "weights": weights}), flush=True)


def loop(settings: Mapping[str, Any]) -> None:
    """Child: a round of the bare loop per line. No class or function of the engine is in it."""
    import torch
    from torch import nn

    from fedkl.data import load, partition
    from fedkl.models import build
    from fedkl.rng import derive

    torch.set_num_threads(1)
    clock = _Clock()
    clock.wait()
    train = load("fashion-mnist", seed=0).train
    count = settings["clients"]
    parts = partition(
        train.labels, count, generator=derive(0, "partition"), samples=settings["images"]
    )
    model = build("lenet", num_classes=10, generator=derive(0, "model"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number in range(1, settings["rounds"] + 1):
        total = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for client, part in enumerate(parts):
            model.load_state_dict(state)
            model.train()
            optimizer = torch.optim.SGD(
                model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
            )
            generator = derive(0, "client", client, "round", number)
            # The engine's first draw goes to dropout; drawn here too, the batches are the same.
            torch.randint(2**62, (1,), generator=generator)
            order = part[torch.randperm(len(part), generator=generator)]
            for rows in torch.split(order, 64):
                x, y = train.batch(rows)
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            for name, tensor in model.state_dict().items():
                total[name] += tensor
        state = {name: tensor / count for name, tensor in total.items()}
        last = number == settings["rounds"]
        clock.answer(_probe(state) if last else [])
        if not last:
            clock.wait()


def _probe(state: Mapping[str, Any]) -> list[float]:
    """Some weights of every tensor, to show that all did the same work."""
    return [value for name in sorted(state) for value in state[name].flatten()[:5].tolist()]


def _probe_file(folder: Path, round_: int) -> list[float]:
    from fedkl.federation.checkpoint import Checkpoints

    return _probe(Checkpoints(folder / "checkpoints").load(round_).shared)


class _Clock:
    """Waits for a line, and answers with the time since in wall and processor seconds."""

    def wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit("the benchmark is gone")
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def answer(self, weights: list[float]) -> None:
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        print(json.dumps({"wall": wall, "cpu": cpu, "weights": weights}), flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    {"engine": engine, "whole": whole, "loop": loop}[given["role"]](given)
