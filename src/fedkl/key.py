"""The client's private key: 32 bytes from the OS, everything else derived by HKDF and ChaCha20.

A key never turns into text, a pickle or a state dict. The one way out of the process is
:meth:`Key.save`, the one way in :meth:`Key.load`. HKDF is RFC 5869 with SHA-256 and no salt,
the key stream is ChaCha20 of RFC 8439 with nonce 0 and counter 0 under a key of its own.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import math
import os
import secrets
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeAlias, final

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, aead, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from torch import Tensor

from fedkl.errors import ConfigError, KeyFileError, OutputError, SecretError, unknown
from fedkl.files import write_bytes

Kind: TypeAlias = Literal["seed", "vector"]
_Path: TypeAlias = str | os.PathLike[str]
_Bytes: TypeAlias = bytes  # within KeyStream the name ``bytes`` is a method

MAX_VECTOR: Final = 2**20  # entries of an imported vector
_SEED: Final = 32  # bytes
_MAX_FILE: Final = 8 * 2**20  # bytes; a vector of MAX_VECTOR entries takes 5.6 MB in base64
_FIELDS: Final = {"format", "version", "kind", "fingerprint", "encryption", "secret"}
_KNOWN: Final = {"cipher": "AES-256-GCM", "kdf": "scrypt"}
_SCRYPT: Final = {"n": 2**15, "r": 8, "p": 1}  # what save() uses: 32 MiB
_SCRYPT_MAX: Final = {"n": 2**17, "r": 8, "p": 4}  # what load() consents to: 128 MiB


def _refuse(secret: object, *_: object) -> NoReturn:
    raise SecretError(
        f"a {type(secret).__name__} cannot be pickled, so that no secret leaves the client along "
        "with a model. Save a key with key.save(path); derive a stream anew with key.stream(...)."
    )


@final
class KeyStream:
    """Pseudorandom values of one key without end; each call goes on where the last one ended.

    Values are the same on every platform, save for the last bit of ``normal`` (log and cos vary).
    """

    __slots__ = ("_encryptor",)

    def __init__(self, key: _Bytes) -> None:
        """The ChaCha20 key stream of ``key`` (32 bytes) from block 0 on."""
        self._encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def bytes(self, n: int) -> _Bytes:
        """The next ``n`` >= 0 bytes. Raises ConfigError for a negative ``n``."""
        if n < 0:
            raise ConfigError(f"cannot take {n} bytes of a key stream; ask for 0 or more.")
        return self._encryptor.update(bytes(n))

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """float32 of ``shape``, uniform on the multiples of 2**-24 in [0, 1); 4 bytes each."""
        words = np.frombuffer(self.bytes(4 * math.prod(shape)), dtype="<u4")
        return _tensor((words >> 8) * 2.0**-24, shape)

    def signs(self, shape: Sequence[int]) -> Tensor:
        """float32 of ``shape``, -1 or 1 with equal chances; 1 bit each, whole bytes per call."""
        count = math.prod(shape)
        octets = np.frombuffer(self.bytes((count + 7) // 8), dtype=np.uint8)
        return _tensor(2.0 * np.unpackbits(octets, count=count, bitorder="little") - 1.0, shape)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """float32 of ``shape``, N(0, 1) by Box-Muller on 53-bit uniforms; 16 bytes per pair."""
        count = math.prod(shape)
        pairs = (count + 1) // 2
        words = np.frombuffer(self.bytes(16 * pairs), dtype="<u8").reshape(pairs, 2) >> 11
        radius = np.sqrt(-2.0 * np.log((words[:, 0] + 1.0) * 2.0**-53))  # (0, 1]: log is finite
        angle = 2.0 * np.pi * (words[:, 1] * 2.0**-53)
        values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return _tensor(values.reshape(-1)[:count], shape)

    def __repr__(self) -> str:
        return "KeyStream(secret)"

    __reduce_ex__ = __reduce__ = __getstate__ = _refuse


LAWS: Final = {"sign": KeyStream.signs, "uniform": KeyStream.uniform, "normal": KeyStream.normal}
"""Laws of a key vector: ±1, uniform on [0, 1) (the paper's), standard normal."""


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
        return cls._of("seed", secrets.token_bytes(_SEED))

    @classmethod
    def from_vector(cls, values: Tensor | Sequence[float]) -> Key:
        """A key that is a given vector, as the paper's code has it.

        Args:
            values: 1 to 2**20 finite real numbers, 1-D; kept as float32.

        Raises:
            ConfigError: any other shape, type or value; the message names no value.
        """
        wanted = f"expected 1 to {MAX_VECTOR} finite real numbers in one dimension"
        tensor = torch.empty(0, dtype=torch.complex64)
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
            dtype = None if isinstance(values, Tensor) else torch.float64  # whatever the default is
            tensor = torch.as_tensor(values, dtype=dtype).detach()
        if tensor.is_complex():
            raise ConfigError(f"a key vector of this {type(values).__name__} is no use: {wanted}.")
        if tensor.ndim != 1 or not 1 <= tensor.numel() <= MAX_VECTOR:
            raise ConfigError(f"a key vector of shape {tuple(tensor.shape)} is no use: {wanted}.")
        vector = tensor.to("cpu", torch.float32)
        if not torch.isfinite(vector).all():
            raise ConfigError(f"a key vector with NaN or values beyond float32: {wanted}.")
        return cls._of("vector", vector.numpy().astype("<f4").tobytes())

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
        if length < 1:
            raise ConfigError(f"a key vector needs a length of at least 1, got {length}.")
        if self._kind == "vector":
            values = np.frombuffer(self._secret, dtype="<f4")
            if len(values) != length:
                raise ConfigError(
                    f"the imported key has {len(values)} entries, but {length} are asked for. Set "
                    f"the key length to {len(values)}, import {length} values or Key.generate()."
                )
            return _tensor(values, (length,))
        if law not in LAWS:
            raise ConfigError(unknown("law of the key vector", law, LAWS))
        stream = KeyStream(self._derive(f"fedkl/v1/vector/{law}".encode(), 32))
        return LAWS[law](stream, (length,))

    def stream(self, layer: str, epoch: int = 0) -> KeyStream:
        """The key stream of one layer and epoch, from its beginning; independent of all others.

        It is as unpredictable as the key: see ``kind`` before relying on an imported one.

        Raises:
            ConfigError: an epoch outside [0, 2**64).
        """
        if not 0 <= epoch < 2**64:
            raise ConfigError(f"the epoch of a key stream must be in [0, 2**64), got {epoch}.")
        name = layer.encode("utf-8", "surrogatepass")
        # Both numbers have a fixed width, so no two (layer, epoch) read alike.
        tail = len(name).to_bytes(8, "big") + name + epoch.to_bytes(8, "big")
        return KeyStream(self._derive(b"fedkl/v1/stream" + tail, 32))

    def save(self, path: _Path, *, passphrase: str | None = None, overwrite: bool = False) -> None:
        """Write the key to a JSON file that only its owner may read (0600), atomically.

        Args:
            path: file to write; its folder must exist.
            passphrase: encrypts the secret with AES-256-GCM under scrypt(n=2**15, r=8, p=1).
            overwrite: replace an existing file. A key that is overwritten is lost.

        Raises:
            KeyFileError: the file exists and ``overwrite`` is False, or the passphrase is empty.
            OutputError: the file cannot be written.
        """
        document: dict[str, Any] = {"format": "fedkl-key", "version": 1, "kind": self._kind}
        document |= {"fingerprint": self.fingerprint, "encryption": None}
        secret = self._secret
        if passphrase is not None:
            secret = _encrypt(document, secret, passphrase)
        document["secret"] = base64.b64encode(secret).decode()
        data = (json.dumps(document, indent=2) + "\n").encode()
        try:
            write_bytes(path, data, private=True, overwrite=overwrite)
        except OutputError as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
            raise KeyFileError(
                f"{path} exists already. Choose another path; overwrite=True loses the old key."
            ) from None

    @classmethod
    def load(cls, path: _Path, *, passphrase: str | None = None) -> Key:
        """Read a key file written by :meth:`save`.

        Raises:
            KeyFileError: the file is missing, readable by others (POSIX), damaged or edited; or
                it is encrypted and the passphrase is missing or wrong, or the other way round.
        """
        document = _parse(path, _read(path))
        secret = _decode(path, "secret", document["secret"])
        if document["encryption"] is not None:
            secret = _decrypt(path, document, secret, passphrase)
        elif passphrase is not None:
            raise KeyFileError(
                f"{path} is not encrypted, but a passphrase was given. Load it without one, or "
                "save it again with save(path, passphrase=..., overwrite=True)."
            )
        if not _well_formed(document["kind"], secret):
            raise _damaged(path, f"a secret of {len(secret)} bytes that is no {document['kind']}")
        key = cls._of(document["kind"], secret)
        if document["fingerprint"] != key.fingerprint:
            raise _damaged(path, "a fingerprint that is not the one of its secret")
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
    __reduce_ex__ = __reduce__ = __getstate__ = _refuse


def _tensor(values: np.ndarray[Any, Any], shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32).reshape(tuple(shape)))


def _well_formed(kind: Kind, secret: bytes) -> bool:
    if kind == "seed":
        return len(secret) == _SEED
    whole = len(secret) % 4 == 0 and 4 <= len(secret) <= 4 * MAX_VECTOR
    return whole and bool(np.isfinite(np.frombuffer(secret, dtype="<f4")).all())


def _damaged(path: _Path, what: str) -> KeyFileError:
    return KeyFileError(f"{path} is damaged or edited: it has {what}. Restore it from a copy.")


def _read(path: _Path) -> bytes:
    try:
        with Path(path).open("rb") as file:
            # Of the open file, not of the name: nobody can swap it in between.
            mode = os.fstat(file.fileno()).st_mode & 0o777
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise KeyFileError(
            f"{path} cannot be read as a key file: {error.strerror}. Check the path, or make a "
            "key with Key.generate().save(path)."
        ) from None
    if os.name == "posix" and mode & 0o077:
        _parse(path, data)  # nobody shall be told to close a file that is no key
        raise KeyFileError(
            f"{path} has mode {mode:04o}, so others than its owner may use the key; "
            f"expected 0600. Run: chmod 600 {path}"
        )
    return data


def _parse(path: _Path, data: bytes) -> dict[str, Any]:
    document: object = None
    if len(data) <= _MAX_FILE:
        # Suppressed, not chained: a JSONDecodeError carries the whole file, secret included.
        with contextlib.suppress(ValueError, RecursionError):
            document = json.loads(data)
    if not isinstance(document, dict) or document.get("format") != "fedkl-key":
        raise KeyFileError(
            f'{path} is not a whole FedKL key file: expected JSON with "format": "fedkl-key". It '
            "was cut off, edited, or is something else; check the path or restore it from a copy."
        )
    version = repr(document.get("version"))  # as text, for True and 1.0 are equal to 1
    if version != "1":
        raise KeyFileError(
            f"{path} is a key file of version {version:.40}, expected 1. Upgrade FedKL."
        )
    if set(document) != _FIELDS or document["kind"] not in ("seed", "vector"):
        raise _damaged(path, "not the fields of a key file, or an unknown kind")
    return document


def _decode(path: _Path, name: str, text: Any) -> bytes:
    decoded = b""
    with contextlib.suppress(ValueError, TypeError):
        decoded = base64.b64decode(text, validate=True)
    # Base64 has several spellings of the same bytes; only the one save() writes is accepted.
    if base64.b64encode(decoded).decode() != text:
        raise _damaged(path, f"a {name} that is not base64")
    return decoded


def _authenticated(document: dict[str, Any]) -> bytes:
    header = {name: value for name, value in document.items() if name != "secret"}
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def _cipher(passphrase: str, salt: bytes, n: int, r: int, p: int) -> aead.AESGCM:
    if not passphrase:
        raise KeyFileError("the passphrase is empty. Give one, or None for no encryption.")
    # NFKC: the same characters are the same passphrase, whichever keyboard composed them.
    text = unicodedata.normalize("NFKC", passphrase).encode("utf-8", "surrogatepass")
    return aead.AESGCM(Scrypt(salt=salt, length=32, n=n, r=r, p=p).derive(text))


def _encrypt(document: dict[str, Any], secret: bytes, passphrase: str) -> bytes:
    """The encrypted secret; ``document["encryption"]`` then says how."""
    nonce, salt = secrets.token_bytes(12), secrets.token_bytes(16)
    text = {"nonce": base64.b64encode(nonce).decode(), "salt": base64.b64encode(salt).decode()}
    document["encryption"] = {**_KNOWN, **_SCRYPT, **text}
    return _cipher(passphrase, salt, **_SCRYPT).encrypt(nonce, secret, _authenticated(document))


def _decrypt(path: _Path, document: dict[str, Any], secret: bytes, passphrase: str | None) -> bytes:
    header = document["encryption"]
    if not isinstance(header, dict) or set(header) != {"nonce", "salt", *_KNOWN, *_SCRYPT}:
        raise _damaged(path, "not the fields of an encryption header")
    if any(header[name] != value for name, value in _KNOWN.items()):
        raise _damaged(path, f"an unknown cipher; known is {_KNOWN}")
    # A file may come from anybody: it must not make us allocate gigabytes or work for hours.
    for name, most in _SCRYPT_MAX.items():
        value, least = header[name], 2 if name == "n" else 1
        if type(value) is not int or not least <= value <= most or value & (value - 1):
            raise _damaged(path, f"a scrypt {name} that is no power of two in [{least}, {most}]")
    nonce, salt = (_decode(path, name, header[name]) for name in ("nonce", "salt"))
    if (len(nonce), len(salt)) != (12, 16):
        raise _damaged(path, "a nonce or salt of the wrong length")
    if passphrase is None:
        raise KeyFileError(f"{path} is encrypted. Give its passphrase: load(path, passphrase=...).")
    cipher = _cipher(passphrase, salt, header["n"], header["r"], header["p"])
    try:
        return cipher.decrypt(nonce, secret, _authenticated(document))
    except InvalidTag:
        raise KeyFileError(
            f"{path} does not open: the passphrase is wrong or the file was edited. Try the "
            "passphrase again; if it is right, restore the file from a copy."
        ) from None
