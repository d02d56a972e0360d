"""What a run writes down as it goes: metrics.jsonl, and TensorBoard scalars where installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkl.files import write_bytes


class Logbook:
    """Appends one JSON line per evaluation.

    Args:
        folder: The run folder.
        after: Lines of rounds above this one are dropped: the run goes on from there.
    """

    def __init__(self, folder: Path, *, after: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.lines = [line for line in read_lines(self.path) if line["round"] <= after]
        self._write()
        self._board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            module: Any = importlib.import_module("torch.utils.tensorboard")
            self._board = module.SummaryWriter(folder / "tensorboard", purge_step=after + 1)

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds a line with ``round`` and ``accuracy``."""
        self.lines.append(dict(line))
        self._write()
        if self._board is not None:
            for name, value in line["accuracy"].items():
                if isinstance(value, float):
                    self._board.add_scalar(f"accuracy/{name}", value, line["round"])
            if line["loss"] is not None:
                self._board.add_scalar("loss", line["loss"], line["round"])

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        if self._board is not None:
            self._board.close()

    def _write(self) -> None:
        # Rewritten whole: the file is small, and a cut line would be a lost evaluation.
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.lines)
        write_bytes(self.path, text.encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a ``metrics.jsonl``; none where there is no such file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # evaluations can be repeated; a damaged line is not worth stopping for
        if isinstance(line, dict) and isinstance(line.get("round"), int):
            lines.append(line)
    return lines
