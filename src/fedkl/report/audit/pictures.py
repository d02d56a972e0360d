"""PNG files below the audit's folder, each embedded once however often it is shown."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Embedded:
    """One picture of the page: ``id`` is the name of its SVG symbol, sizes are in pixels."""

    id: str
    width: int
    height: int
    uri: str


class Album:
    """Collects the pictures of one page.

    The page holds each file as one SVG symbol and shows it by reference, so that a victim that
    appears beside ten reconstructions is stored once. What lies outside the folder is never read.

    Args:
        folder: Folder of the audit.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._known: dict[str, Embedded | None] = {}
        self._stored: dict[str, Embedded] = {}
        self.refused: list[str] = []
        self.missing: list[str] = []

    @property
    def all(self) -> list[Embedded]:
        """Every picture that was added, each once."""
        return list(self._stored.values())

    def add(self, name: str) -> Embedded | None:
        """The picture of that path relative to the folder.

        Returns:
            None if ``name`` is empty, outside of the folder (links followed), missing, or not a
            PNG; which of them is in ``refused`` and ``missing``.
        """
        if name and name not in self._known:
            self._known[name] = self._embed(name)
        return self._known.get(name)

    def _embed(self, name: str) -> Embedded | None:
        try:
            path = (self._folder / name).resolve()
            if not path.is_relative_to(self._folder):
                self.refused.append(name)
                return None
            data = path.read_bytes()
        except (OSError, ValueError, RuntimeError):  # no such file, a zero byte, a loop of links
            self.missing.append(name)
            return None
        width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
        if not data.startswith(_SIGNATURE) or data[12:16] != b"IHDR" or not (width and height):
            self.refused.append(name)
            return None
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._stored:
            uri = "data:image/png;base64," + base64.b64encode(data).decode()
            self._stored[digest] = Embedded(f"p{len(self._stored)}", width, height, uri)
        return self._stored[digest]
