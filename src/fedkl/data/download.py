"""Fetching a file of known digest, quietly and with a short wait."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

_WAIT_SECONDS = 5.0
_CHUNK_BYTES = 1 << 20


def cache_folder() -> Path:
    """Where downloads are kept: ``$XDG_CACHE_HOME/fedkl``, by default ``~/.cache/fedkl``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedkl"


def fetch(urls: Sequence[str], target: Path, md5: str) -> None:
    """Download the first of ``urls`` that answers with the right content to ``target``.

    The file appears under its name only when complete. MD5 is what torchvision publishes for
    these files; it finds broken transfers, not forgeries.

    Raises:
        OSError: no address gave the file; the message tells the reason for each.
    """
    reasons = []
    for url in urls:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch_one(url, target, md5)
            return
        except (OSError, HTTPException) as error:
            reasons.append(f"{url}: {error}")
    raise OSError("; ".join(reasons))


def _fetch_one(url: str, target: Path, md5: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    part = Path(name)
    try:
        with (
            os.fdopen(handle, "wb") as file,
            urllib.request.urlopen(url, timeout=_WAIT_SECONDS) as answer,
        ):
            while chunk := answer.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != md5:
            raise OSError(f"MD5 {digest.hexdigest()}, expected {md5}")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
