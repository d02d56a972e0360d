"""What every benchmark shares: rows of results, ratios with intervals, child processes."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
HERE: Final = Path(__file__).resolve().parent
Note = Callable[[str], None]

_RESAMPLES: Final = 4000
_FEWEST: Final = 5


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
        part: ``a`` … ``e``.
        what: What was compared with what.
        figure: The ratio, or None where it could not be measured.
        interval: Bootstrap 95 % interval of the ratio's median, or None.
        cpu: The same ratio in processor time instead of wall time, or None.
        target: ``<= 1.05`` or ``>= 10``; empty where nothing was promised.
        samples: Raw samples by arm, in the order they were taken.
        note: What a reader should know.
    """

    part: str
    what: str
    figure: float | None
    interval: tuple[float, float] | None = None
    cpu: float | None = None
    target: str = ""
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the figure itself is within the target; None where there is none of either."""
        if not self.target or self.figure is None:
            return None
        sign, limit = self.target.split()
        return self.figure <= float(limit) if sign == "<=" else self.figure >= float(limit)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the median of every arm."""
        medians = {name: statistics.median(values) for name, values in self.samples.items()}
        return {**asdict(self), "met": self.met, "medians": medians}


def paired(
    over: Sequence[float], under: Sequence[float]
) -> tuple[float, tuple[float, float] | None]:
    """Median of the ratios of neighbors ``over[i] / under[i]``, and its bootstrap 95 % interval.

    Below five pairs there is no interval: resampling so few says nothing about the rest.
    """
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    if len(ratios) < _FEWEST:
        return statistics.median(ratios), None
    rng = random.Random(0)
    medians = sorted(
        statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES)
    )
    low, high = medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES) - 1]
    return statistics.median(ratios), (low, high)


def ratio_row(
    part: str,
    what: str,
    arms: tuple[str, str],
    wall: Mapping[str, Sequence[float]],
    *,
    cpu: Mapping[str, Sequence[float]] | None = None,
    target: str = "",
    note: str = "",
) -> Row:
    """A row for ``arms[0] / arms[1]`` from samples taken in turns."""
    over, under = arms
    figure, interval = paired(wall[over], wall[under])
    samples = {f"{arm} [s]": list(wall[arm]) for arm in arms}
    cpu_ratio = None
    if cpu is not None:
        cpu_ratio = paired(cpu[over], cpu[under])[0]
        samples |= {f"{arm} [processor s]": list(cpu[arm]) for arm in arms}
    return Row(part, what, figure, interval, cpu_ratio, target, samples, note)


def environment() -> dict[str, str]:
    """Environment of a child: this source tree, one thread."""
    path = os.pathsep.join(p for p in (str(ROOT / "src"), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def command(script: str, settings: Mapping[str, Any], python: str = sys.executable) -> list[str]:
    """Command line of a child that runs ``script`` of this folder with ``settings`` as JSON."""
    return [python, str(HERE / script), json.dumps(dict(settings))]


def ask(script: str, settings: Mapping[str, Any], python: str = sys.executable) -> dict[str, Any]:
    """Runs a child to its end and returns the JSON object on its last line of output.

    Raises:
        RuntimeError: The child failed; its last lines of error output are in the message.
    """
    done = subprocess.run(
        command(script, settings, python), env=environment(), capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{script} {dict(settings)} failed:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


class Stepper:
    """A child that does one piece of work per line it is sent and answers with a line of JSON.

    Several of them, asked in turn, take their samples under the same weather.
    """

    def __init__(
        self, script: str, settings: Mapping[str, Any], python: str = sys.executable
    ) -> None:
        self.process = subprocess.Popen(
            command(script, settings, python),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> dict[str, Any]:
        """Lets the child do its next piece of work and waits for it."""
        _pipe(self.process.stdin).write("\n")
        _pipe(self.process.stdin).flush()
        line = _pipe(self.process.stdout).readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended early; see its output above.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Waits until the child, which has done all its pieces, is gone."""
        _pipe(self.process.stdin).close()
        self.process.wait(60)


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def in_turns(steppers: Mapping[str, Stepper], rounds: int, note: Note) -> dict[str, list[Any]]:
    """``rounds`` answers of every stepper, asked A B C, then C B A, and so on."""
    answers: dict[str, list[Any]] = {name: [] for name in steppers}
    for number in range(rounds):
        names = list(steppers) if number % 2 == 0 else list(steppers)[::-1]
        for name in names:
            answers[name].append(steppers[name].step())
        last = ", ".join(f"{n} {answers[n][-1]['wall']:.3f} s" for n in steppers)
        note(f"  {number + 1}/{rounds}: {last}")
    return answers
