"""How a page gets onto the disk: whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fedkl.errors import OutputError


def write_page(path: Path, text: str) -> Path:
    """Writes ``text`` as UTF-8 to ``path``, atomically, and returns ``path``.

    Raises:
        OutputError: The folder is missing, full or not writable; nothing is left behind.
    """
    # fedkl.files would do, but it loads torch.
    temporary = path.with_name(f".fedkl-{secrets.token_hex(8)}.tmp")
    try:
        # A lone surrogate, which JSON may hold, has no UTF-8.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {path}: {error.strerror}; choose another folder."
        ) from error
    return path
