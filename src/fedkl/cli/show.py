"""What people see: consoles, progress, tables. Results go to stdout, all else to stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fedkl.federation import Event

COLUMNS = {
    "own_key": "own key",
    "wrong_key": "wrong key",
    "wrong_key_p95": "wrong key p95",
    "other_client": "other client",
    "outsider": "outsider (no lock)",
    "no_lock": "insider (no lock)",
}
MEANING = (
    "outsider: has the global model alone; insider: another client, with other clients' locks and "
    "the group key. Both: the best way to use the model without a client's own lock."
)


def out() -> Console:
    """The console of results; wide enough for any table of ours where nobody looks."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def err() -> Console:
    """The console of progress and notes."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def plain(text: str) -> str:
    """``text`` on one line, without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def say(text: str) -> None:
    """One line on stderr."""
    print(plain(text), file=sys.stderr, flush=True)


def percent(value: float | None) -> str:
    """A fraction as ``86.4 %``, a dash where the thing does not apply."""
    return "–" if value is None else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def accuracy_table(title: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """A row per run: accuracies of ``Accuracy.to_dict()`` under the columns of the issue."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("run", style="bold", no_wrap=True)
    for name in COLUMNS.values():
        table.add_column(name.replace(" (", "\n("), justify="right", no_wrap=True)
    for name, accuracy in rows:
        table.add_row(Text(name), *(percent(accuracy.get(column)) for column in COLUMNS))
    return table


def table_of(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of plain text; nothing in it is taken for markup."""
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table


class _Left(ProgressColumn):
    """Time left, from the mean speed since the start: rounds are long and much alike."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        done, start = task.completed - task.fields["base"], task.elapsed
        if done <= 0 or not start or task.total is None:
            return Text("")
        left = start / done * (task.total - task.completed)
        return Text(f"{duration(left)} left" if left >= 1 else "", style="cyan")


class _State:
    """The words beside the bar, and what they are made of."""

    def __init__(self) -> None:
        self.clients, self.loss, self.own = "", "", ""

    def take(self, event: Event) -> None:
        if event.kind == "client":
            self.clients = f"client {event.done}/{event.of}"
        if event.kind in ("client", "round") and math.isfinite(event.loss):
            self.loss = f"loss {event.loss:.3f}"
        if event.accuracy is not None:
            self.own = f"own key {percent(event.accuracy.own_key)}"

    def __str__(self) -> str:
        return "  ".join(filter(None, (self.clients, self.loss, self.own)))


@contextmanager
def watching(label: str, rounds: int) -> Iterator[Callable[[Event], None]]:
    """Shows the events of a run: a live bar on a terminal, one line a round elsewhere."""
    console = err()
    if not console.is_terminal:
        yield _lines(label)
        return
    progress = Progress(
        TextColumn("[bold]{task.fields[label]}", markup=True),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
        _Left(),
        console=console,
    )
    with progress:
        yield _bar(progress, label, rounds)


def _bar(progress: Progress, label: str, rounds: int) -> Callable[[Event], None]:
    state = _State()
    task = progress.add_task("", total=rounds, label=label, state="reading data", base=0)
    begun = False

    def watch(event: Event) -> None:
        nonlocal begun
        if event.kind == "note":
            progress.console.print(f"note: {plain(event.message)}", markup=False)
            return
        if not begun:  # a run that is resumed does not start at 0
            progress.reset(task, completed=event.round - 1)
            progress.update(task, base=event.round - 1)
            begun = True
        state.take(event)
        done: float = event.round
        if event.kind == "client":
            done = event.round - 1 + (event.done - 0.5) / event.of
        progress.update(task, completed=min(done, rounds), state=str(state))
        if event.kind == "round" and event.round == rounds:
            progress.update(task, state=f"{state}  measuring on the test set")

    return watch


def _lines(label: str) -> Callable[[Event], None]:
    started, first, state = time.monotonic(), 0, _State()

    def watch(event: Event) -> None:
        nonlocal first
        first = first or event.round
        if event.kind == "note":
            say(f"{label}: note: {event.message}")
        elif event.accuracy is not None:
            found = event.accuracy.to_dict()
            figures = (f"{COLUMNS[n]} {percent(found[n])}" for n in COLUMNS if found[n] is not None)
            say(f"{label}: round {event.round}: {', '.join(figures)}")
            state.take(event)
        elif event.kind == "round":
            passed = time.monotonic() - started
            left = passed / (event.round - first + 1) * (event.rounds - event.round)
            state.take(event)
            say(
                f"{label}: round {event.round}/{event.rounds}  {state}  {duration(passed)}, "
                f"about {duration(left)} left"
            )

    return watch
