"""How a result came about: the command and the versions."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys

from fedkl._version import __version__

_PACKAGES = ("torch", "torchvision", "numpy", "safetensors", "cryptography")


def command_line() -> str:
    """The command of this process, ready for a shell. Passphrases are never on it."""
    return shlex.join(["fedkl", *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of FedKL, Python and the packages a result depends on."""
    found = {"fedkl": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = importlib.metadata.version(name)
    return {**found, "machine": f"{platform.system()} {platform.machine()}"}
