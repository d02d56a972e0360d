"""FedKL: lock any PyTorch model with a client's private key and train it federated.

This module is the public surface and nothing else. Names are looked up on first use (PEP 562), so
``import fedkl`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fedkl._version import __version__

if TYPE_CHECKING:
    from fedkl.errors import FedKLError
    from fedkl.federation import at_length
    from fedkl.key import Key
    from fedkl.locking import (
        Channel,
        LockSpec,
        Pad,
        calibrate,
        check_optimizer,
        epoch_of,
        load_private_state,
        load_shared_state,
        lock,
        lock_like,
        lock_spec,
        lockable,
        meeting_points,
        merge,
        private_state,
        renew,
        set_key,
        shared_state,
        unlock,
    )

__all__ = [
    "Channel",
    "FedKLError",
    "Key",
    "LockSpec",
    "Pad",
    "__version__",
    "at_length",
    "calibrate",
    "check_optimizer",
    "epoch_of",
    "load_private_state",
    "load_shared_state",
    "lock",
    "lock_like",
    "lock_spec",
    "lockable",
    "meeting_points",
    "merge",
    "private_state",
    "renew",
    "set_key",
    "shared_state",
    "unlock",
]

_HOMES = {
    "Channel": "fedkl.locking",
    "FedKLError": "fedkl.errors",
    "Key": "fedkl.key",
    "LockSpec": "fedkl.locking",
    "Pad": "fedkl.locking",
    "at_length": "fedkl.federation",
    "calibrate": "fedkl.locking",
    "check_optimizer": "fedkl.locking",
    "epoch_of": "fedkl.locking",
    "load_private_state": "fedkl.locking",
    "load_shared_state": "fedkl.locking",
    "lock": "fedkl.locking",
    "lock_like": "fedkl.locking",
    "lock_spec": "fedkl.locking",
    "lockable": "fedkl.locking",
    "meeting_points": "fedkl.locking",
    "merge": "fedkl.locking",
    "private_state": "fedkl.locking",
    "renew": "fedkl.locking",
    "set_key": "fedkl.locking",
    "shared_state": "fedkl.locking",
    "unlock": "fedkl.locking",
}


def __getattr__(name: str) -> object:
    """The public name, imported from the module that defines it and kept for the next time."""
    if name not in _HOMES:
        # The interpreter needs `name` and `obj` to say "Did you mean ...?".
        message = f"module 'fedkl' has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=import_module(__name__))
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Every public name, resolved or not, and what the module holds besides."""
    return sorted({*globals(), *__all__})
