"""How a result came about: the command and the versions."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
from contextvars import ContextVar

from fedkl._version import __version__

_PACKAGES = ("torch", "torchvision", "numpy", "safetensors", "cryptography")

arguments: ContextVar[tuple[str, ...]] = ContextVar("arguments", default=())
"""What this command was called with."""


def command_line(without: str = "") -> str:
    """The present command, ready for a shell, ``without`` one flag. Passphrases are never on it."""
    return shlex.join(["fedkl", *(word for word in arguments.get() if word != without)])


def versions() -> dict[str, str]:
    """Versions of FedKL, Python and the packages a result depends on."""
    found = {"fedkl": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = importlib.metadata.version(name)
    return {**found, "machine": f"{platform.system()} {platform.machine()}"}
