"""Names that the tests of the command line share."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedkl.federation import Event, run
from fedkl.federation.folder import read_config

SMALL = [
    *("--dataset", "digits", "--image-size", "16", "--local-steps", "2", "--eval-every", "1"),
    *("--eval-images", "40"),
]
# For those with a lock.
EXAMINED = ["--wrong-keys", "2", "--wrong-key-images", "40", "--thief-images", "40"]


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


Call = Callable[..., Answer]


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below ``folder`` with a digest of its bytes."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
        for path in sorted(folder.rglob("*"))
    }


def with_(words: Sequence[str], *changes: str) -> list[str]:
    """``words`` with the values of flags replaced, or flags added."""
    found = list(words)
    for flag, value in zip(changes[::2], changes[1::2], strict=True):
        if flag in found:
            found[found.index(flag) + 1] = value
        else:
            found += [flag, value]
    return found


def extended(folder: Path, *, rounds: int, stop: int) -> None:
    """The finished run in ``folder``, asked for more rounds and killed after round ``stop``."""

    class Killed(Exception):
        pass

    def on_event(event: Event) -> None:
        if event.kind == "round" and event.round == stop:
            raise Killed

    config = read_config(folder)
    longer = dataclasses.replace(config.federation, rounds=rounds)
    with contextlib.suppress(Killed):
        run(dataclasses.replace(config, federation=longer), folder, resume=True, on_event=on_event)


def refused(call: Call, folder: Path, words: Sequence[str], fragments: Sequence[str]) -> None:
    """Asserts what acceptance 4 asks for."""
    before = snapshot(folder)
    answer = call(*(word.replace("{tmp}", str(folder)) for word in words))
    assert answer.code == 2, answer
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1  # one line
    assert "Traceback" not in answer.err
    for fragment in fragments:
        assert fragment in answer.err
    assert snapshot(folder) == before
