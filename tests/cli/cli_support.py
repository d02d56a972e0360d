"""Names that the tests of the command line share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SMALL = [
    *("--dataset", "digits", "--image-size", "16", "--local-steps", "2", "--eval-every", "1"),
    *("--eval-images", "40", "--wrong-keys", "2", "--wrong-key-images", "40"),
    *("--thief-images", "40"),
]


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
