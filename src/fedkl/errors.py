"""Every error FedKL raises on purpose.

Each subclasses :class:`FedKLError` and the builtin that a caller would expect, so both
``except FedKLError`` and ``except ValueError`` work. A message says what was got, what was
expected and what to do next; the command line prints it on one line and exits with code 2.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Final


class FedKLError(Exception):
    """Root of all errors that are the caller's to mend."""


class ConfigError(FedKLError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(FedKLError, ValueError):
    """Data is there but cannot be used (corrupt file, too few examples, empty partition)."""


class DataNotFoundError(FedKLError, FileNotFoundError):
    """A data set is nowhere to be found; the message lists the ways to get it."""


class ModelError(FedKLError, ValueError):
    """A model name, factory or initialization cannot be used."""


class KeyFileError(FedKLError, ValueError):
    """A key file is missing, damaged, too open, or does not open with this passphrase."""


class SecretError(FedKLError, TypeError):
    """Something tried to turn a secret into text, bytes or a pickle."""


class LockError(FedKLError, ValueError):
    """A model cannot be locked or unlocked as asked."""


class ShortcutWarning(UserWarning):
    """Something of the input goes around the first lock of a pad, which does not hide that part."""


class ExtraStateWarning(UserWarning):
    """A model keeps something in its state dict that is neither shared nor private state."""


class StateError(FedKLError, ValueError):
    """Names, shapes or dtypes of a state do not match the model it is meant for."""


class UpdateError(FedKLError, ValueError):
    """The server refuses an update; the message names the client and the tensor."""


class CheckpointError(FedKLError, ValueError):
    """A checkpoint or tensor file is missing, truncated or edited."""


class AttackError(FedKLError, ValueError):
    """An attack cannot be mounted on an observation, or its settings contradict each other.

    Attributes:
        victims: Of those that are at fault while the others might be attacked, by their place among
            the observations of the call, what is wrong; empty where it is not about single ones.
    """

    def __init__(self, message: str, victims: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.victims = dict(victims or {})


class FederationError(FedKLError, RuntimeError):
    """A federation cannot go on (too few clients left, a worker died)."""


class OutputError(FedKLError, OSError):
    """A folder or file cannot be written."""


LARGEST: Final = 1e30
"""Rates and scales end here: float32 ends at 3e38, and torch raises on scalars beyond it."""
_LISTED: Final = 100


def check_positive(what: str, value: float) -> None:
    """Refuses a rate or scale that float32 arithmetic could do nothing with.

    Raises:
        ConfigError: ``value`` is not a positive number of at most 1e30.
    """
    if not 0 < value < math.inf:
        raise ConfigError(f"{what} must be a positive number, got {value}.")
    check_size(what, value)


def check_size(what: str, value: float) -> None:
    """Refuses a number that is too large for float32 arithmetic.

    Raises:
        ConfigError: ``value`` is above 1e30.
    """
    if value > LARGEST:
        raise ConfigError(f"{what} must be a number of at most {LARGEST:g}, got {value}.")


def number_of(number: int, noun: str) -> str:
    """``1 round``, ``2 rounds``: for nouns whose plural takes an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def unknown(kind: str, got: str, choices: Iterable[str]) -> str:
    """Message for an unknown name: what was got, the nearest names, and all or the first."""
    names = sorted(choices)
    near = difflib.get_close_matches(got, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    # Of a large network's layers hundreds.
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"unknown {kind} {got!r}.{hint} Choose one of: {', '.join(names[:_LISTED])}{more}."
