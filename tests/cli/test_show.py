"""Progress on a terminal and off it, and how figures are written."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedkl.cli import show
from fedkl.federation import Accuracy, Event


def measured(own: float) -> Accuracy:
    return Accuracy(own, 0.125, 0.25, own, 0.1, 0.7, (own,), (0.1,), (0.125,), 0.1, {})


EVENTS = [
    Event("note", message="resumed after [bold]round 4[/bold]\x1b[2J"),
    *(Event("client", 5, 6, done, 2, 0.5) for done in (1, 2)),
    Event("evaluation", 5, 6, loss=0.5, accuracy=measured(0.8)),
    Event("round", 5, 6, loss=0.5),
    *(Event("client", 6, 6, done, 2, 0.25) for done in (1, 2)),
    Event("round", 6, 6, loss=0.25),
]


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160, color_system=None)
    monkeypatch.setattr(show, "err", lambda: console)
    with show.watching("fedavg channel", 6) as watch:
        for event in EVENTS:
            watch(event)
    text = screen.getvalue()
    assert "note: resumed after [bold]round 4[/bold]" in text  # no markup, and no escapes:
    assert "\x1b[2J" not in text
    for part in ("fedavg channel", "6/6", "client 2/2", "loss 0.250", "own key 80.0 %"):
        assert part in text


def test_bar_starts_where_the_run_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    monkeypatch.setattr(show, "err", lambda: console)
    kept = []

    class Spy(show.Progress):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[arg-type]
            kept.append(self)

    monkeypatch.setattr(show, "Progress", Spy)
    with show.watching("run", 6) as watch:
        for event in EVENTS[:3]:
            watch(event)
        (task,) = kept[0].tasks
        assert task.fields["base"] == 4
        assert 4 < task.completed < 5
        watch(EVENTS[4])
        assert kept[0].tasks[0].completed == 5


def test_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with show.watching("run", 6) as watch:
        for event in EVENTS:
            watch(event)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[1].endswith("own key 80.0 %, wrong key 12.5 %, wrong key p95 25.0 %, "
                             "other client 80.0 %, outsider (no lock) 10.0 %, "
                             "insider (no lock) 70.0 %")  # fmt: skip
    assert lines[2].startswith("run: round 5/6 loss 0.500 own key 80.0 %")
    assert lines[3].endswith("about 0 s left")
    assert len(lines) == 4


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert show.duration(seconds) == text


def test_percent() -> None:
    assert (show.percent(0.8644), show.percent(0.0), show.percent(None)) == ("86.4 %", "0.0 %", "–")
