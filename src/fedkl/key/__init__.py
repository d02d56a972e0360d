"""The client's private key: 32 bytes from the OS, everything else derived by HKDF and ChaCha20.

A key never turns into text, a pickle or a state dict, nor into a local variable of a traceback. The
one way out of the process is :meth:`Key.save`, the one way in :meth:`Key.load`. HKDF is RFC 5869
with SHA-256 and no salt, the key stream is ChaCha20 of RFC 8439 with nonce 0 and counter 0 under a
key of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from fedkl.errors import ConfigError, SecretError, unknown
from fedkl.key.document import (
    MAX_VECTOR,
    SEED,
    Hidden,
    Kind,
    PathLike,
    damaged,
    hide,
    read,
    shielded,
    write,
)
from fedkl.key.stream import LAWS, KeyStream, refuse, to_tensor

__all__ = ["LAWS", "MAX_VECTOR", "Key", "KeyStream", "Kind"]


@final
class Key:
    """A client's secret: 32 random bytes, or an imported vector as the paper has it.

    Keys compare by their secret in constant time. ``copy`` and ``deepcopy`` give the same object;
    ``repr`` and ``str`` show the fingerprint only; pickling raises SecretError.
    """

    __slots__ = ("_kind", "_secret")
    _kind: Kind
    _secret: bytes

    def __init__(self) -> None:
        raise SecretError("a Key is not built by hand: use Key.generate() or Key.load(path).")

    @classmethod
    def _of(cls, kind: Kind, secret: bytes) -> Key:
        key = object.__new__(cls)
        key._kind, key._secret = kind, secret
        return key

    @classmethod
    def generate(cls) -> Key:
        """A new key: 32 bytes from the operating system's CSPRNG."""
        return cls._of("seed", secrets.token_bytes(SEED))

    @classmethod
    def from_vector(cls, values: Tensor | Sequence[float]) -> Key:
        """A key that is a given vector, as the paper's code has it.

        Args:
            values: 1 to 2**20 finite real numbers, 1-D; kept as float32.

        Raises:
            ConfigError: any other shape, type or value; the message names no value.
        """
        given = Hidden(values)
        del values  # no frame of an error may show them
        found = _imported(given)
        if isinstance(found, str):
            raise ConfigError(found)
        return cls._of("vector", found.value)

    @property
    def kind(self) -> Kind:
        """``"seed"``: 256 bits of entropy. ``"vector"``: imported, nobody knows how many."""
        return self._kind

    @property
    def fingerprint(self) -> str:
        """16 hex characters that name the key and do not help to find a random one.

        Whoever can list all candidates for an imported vector can test them against it.
        """
        return self._derive(b"fedkl/v1/fingerprint", 8).hex()

    def vector(self, length: int, law: str = "sign") -> Tensor:
        """The key vector: float32 (length,), the same in every process.

        Args:
            length: number of entries, >= 1. A shorter vector is the beginning of a longer one.
            law: one of ``LAWS``. An imported vector is returned as it is, whatever the law.

        Raises:
            ConfigError: unknown law, length below 1, or not the length of the imported vector.
        """
        if type(length) is not int:
            raise ConfigError(
                f"the length of a key vector is an integer, got {type(length).__name__}."
            )
        if length < 1:
            raise ConfigError(f"a key vector needs a length of at least 1, got {length}.")
        if self._kind == "vector":
            held = len(self._secret) // 4
            if held != length:
                raise ConfigError(
                    f"the imported key has {held} entries, but {length} are asked for. Set "
                    f"the key length to {held}, import {length} values or Key.generate()."
                )
            return to_tensor(np.frombuffer(self._secret, dtype="<f4"), (length,))
        if law not in LAWS:
            raise ConfigError(unknown("law of the key vector", law, LAWS))
        stream = KeyStream(self._derive(f"fedkl/v1/vector/{law}".encode(), 32))
        return LAWS[law](stream, (length,))

    def stream(self, layer: str, epoch: int = 0) -> KeyStream:
        """The key stream of one layer and epoch, from its beginning; independent of all others.

        It is as unpredictable as the key: see ``kind`` before relying on an imported one.

        Raises:
            ConfigError: an epoch outside [0, 2**64), or ``layer`` is no text.
        """
        if not isinstance(layer, str) or type(epoch) is not int:
            raise ConfigError(
                "a key stream goes by a layer's name (text) and an epoch (an integer), got "
                f"{type(layer).__name__} and {type(epoch).__name__}."
            )
        if not 0 <= epoch < 2**64:
            raise ConfigError(f"the epoch of a key stream must be in [0, 2**64), got {epoch}.")
        name = layer.encode("utf-8", "surrogatepass")
        # Both numbers have a fixed width, so no two (layer, epoch) read alike.
        tail = len(name).to_bytes(8, "big") + name + epoch.to_bytes(8, "big")
        return KeyStream(self._derive(b"fedkl/v1/stream" + tail, 32))

    def save(
        self, path: PathLike, *, passphrase: str | None = None, overwrite: bool = False
    ) -> None:
        """Write the key to a JSON file that only its owner may read (0600), atomically.

        Args:
            path: file to write; its folder must exist.
            passphrase: encrypts the secret with AES-256-GCM under scrypt(n=2**15, r=8, p=1).
            overwrite: replace an existing file. A key that is overwritten is lost.

        Raises:
            KeyFileError: the file exists and ``overwrite`` is False, the passphrase is empty or no
                text, or ``path`` is none.
            OutputError: the file cannot be written.
        """
        secret, given = Hidden(self._secret), Hidden(passphrase)
        del passphrase  # no frame of an error may show it
        found = shielded(
            path,
            lambda: write(
                path, self._kind, self.fingerprint, secret, hide(given), overwrite=overwrite
            ),
        )
        if found is not None:
            raise found

    @classmethod
    def load(cls, path: PathLike, *, passphrase: str | None = None) -> Key:
        """Read a key file written by :meth:`save`.

        Raises:
            KeyFileError: the file is missing, readable by others (POSIX), damaged or edited; or
                it is encrypted and the passphrase is missing or wrong, or the other way round.
        """
        given = Hidden(passphrase)
        del passphrase  # no frame of an error may show it
        found = shielded(path, lambda: read(path, hide(given)))
        if isinstance(found, BaseException):
            raise found
        kind, secret, fingerprint = found
        key = cls._of(kind, secret.value)
        if fingerprint != key.fingerprint:
            raise damaged(path, "a fingerprint that is not the one of its secret")
        return key

    def _derive(self, info: bytes, length: int) -> bytes:
        material = self._secret
        if self._kind == "vector":
            material = hashlib.sha256(b"fedkl/v1/imported" + material).digest()
        return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(material)

    def __repr__(self) -> str:
        return f"Key(fingerprint={self.fingerprint})"

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        same = hmac.compare_digest(self._secret, other._secret)
        return same and self._kind == other._kind

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __copy__(self, *_: object) -> Key:
        return self

    __deepcopy__ = __copy__
    __reduce_ex__ = __reduce__ = __getstate__ = refuse


def _imported(values: Hidden[Any]) -> Hidden[bytes] | str:
    """The bytes of an imported vector, or what is wrong with it."""
    wanted = f"expected 1 to {MAX_VECTOR} finite real numbers in one dimension"
    kind = type(values.value).__name__
    tensor = torch.empty(0, dtype=torch.complex64)
    with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
        # Whatever the default is.
        dtype = None if isinstance(values.value, Tensor) else torch.float64
        tensor = torch.as_tensor(values.value, dtype=dtype).detach()
    if tensor.is_complex():
        return f"a key vector of this {kind} is no use: {wanted}."
    if tensor.ndim != 1 or not 1 <= tensor.numel() <= MAX_VECTOR:
        return f"a key vector of shape {tuple(tensor.shape)} is no use: {wanted}."
    vector = tensor.to("cpu", torch.float32)
    if not torch.isfinite(vector).all():
        return f"a key vector with NaN or values beyond float32: {wanted}."
    return Hidden(vector.numpy().astype("<f4").tobytes())
