"""Key files: JSON with the secret in base64, encrypted under a passphrase if asked.

Crash reporters show the local variables of every frame of a traceback. So secrets travel in
:class:`Hidden`, and an error found in a frame that has them is raised anew by one that has not
(:func:`shielded`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import aead
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from fedkl.errors import FedKLError, KeyFileError, OutputError, SecretError
from fedkl.files import write_bytes

Kind: TypeAlias = Literal["seed", "vector"]
PathLike: TypeAlias = str | os.PathLike[str]
T = TypeVar("T")

MAX_VECTOR: Final = 2**20  # entries of an imported vector
SEED: Final = 32  # bytes
_MAX_FILE: Final = 8 * 2**20  # bytes; a vector of MAX_VECTOR entries takes 5.6 MB in base64
_FIELDS: Final = {"format", "version", "kind", "fingerprint", "encryption", "secret"}
_KNOWN: Final = {"cipher": "AES-256-GCM", "kdf": "scrypt"}
_SCRYPT: Final = {"n": 2**15, "r": 8, "p": 1}  # what save() uses: 32 MiB
_SCRYPT_MAX: Final = {"n": 2**17, "r": 8, "p": 4}  # what load() consents to: 128 MiB


class Hidden(Generic[T]):
    """A value that shows itself in no repr and no pickle."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "<hidden>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SecretError("a secret cannot be pickled; save a key with key.save(path).")


Passphrase: TypeAlias = Hidden[str] | None


def shielded(path: PathLike, work: Callable[[], T]) -> T | BaseException:
    """What ``work`` returns, or the error it raised, without the frames it passed through.

    Of errors that are none of ours a KeyFileError; an interrupt (Ctrl-C) stays what it is.
    """
    try:
        return work()
    except FedKLError as error:
        return type(error)(*error.args)
    except Exception as error:
        return KeyFileError(
            f"{path!r:.200} cannot be used as a key file ({type(error).__name__}); give the path "
            "of a file as text or pathlib.Path, and check that there is memory left."
        )
    except BaseException as interrupt:
        interrupt.__cause__ = interrupt.__context__ = None
        return interrupt.with_traceback(None)


def hide(passphrase: Hidden[Any]) -> Passphrase:
    """The passphrase as one, or None for none.

    Raises:
        KeyFileError: It is neither text nor None.
    """
    if passphrase.value is None or isinstance(passphrase.value, str):
        return None if passphrase.value is None else passphrase
    raise KeyFileError(
        f"expected a passphrase as text or None, got {type(passphrase.value).__name__}; decode "
        "bytes first."
    )


def write(
    path: PathLike,
    kind: Kind,
    fingerprint: str,
    secret: Hidden[bytes],
    passphrase: Passphrase,
    *,
    overwrite: bool,
) -> None:
    """Writes a key file; see ``Key.save``. To be called through :func:`shielded`."""
    document: dict[str, Any] = {"format": "fedkl-key", "version": 1, "kind": kind}
    document |= {"fingerprint": fingerprint, "encryption": None}
    if passphrase is not None:
        secret = _encrypt(document, secret, passphrase)
    document["secret"] = base64.b64encode(secret.value).decode()
    data = (json.dumps(document, indent=2) + "\n").encode()
    try:
        write_bytes(path, data, private=True, overwrite=overwrite)
    except OutputError as error:
        if not isinstance(error.__cause__, FileExistsError):
            raise
        raise KeyFileError(
            f"{path} exists already. Choose another path; overwrite=True loses the old key."
        ) from None


def read(path: PathLike, passphrase: Passphrase) -> tuple[Kind, Hidden[bytes], str]:
    """Kind, secret and claimed fingerprint of a key file; see ``Key.load``.

    To be called through :func:`shielded`.
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
        raise damaged(path, f"a secret of {len(secret)} bytes that is no {document['kind']}")
    return document["kind"], Hidden(secret), document["fingerprint"]


def _well_formed(kind: Kind, secret: bytes) -> bool:
    if kind == "seed":
        return len(secret) == SEED
    whole = len(secret) % 4 == 0 and 4 <= len(secret) <= 4 * MAX_VECTOR
    return whole and bool(np.isfinite(np.frombuffer(secret, dtype="<f4")).all())


def damaged(path: PathLike, what: str) -> KeyFileError:
    """The error for a key file that has ``what``."""
    return KeyFileError(f"{path} is damaged or edited: it has {what}. Restore it from a copy.")


def _read(path: PathLike) -> bytes:
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


def _parse(path: PathLike, data: bytes) -> dict[str, Any]:
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
        raise damaged(path, "not the fields of a key file, or an unknown kind")
    return document


def _decode(path: PathLike, name: str, text: Any) -> bytes:
    decoded = b""
    with contextlib.suppress(ValueError, TypeError):
        decoded = base64.b64decode(text, validate=True)
    # Base64 has several spellings of the same bytes; only the one save() writes is accepted.
    if base64.b64encode(decoded).decode() != text:
        raise damaged(path, f"a {name} that is not base64")
    return decoded


def _authenticated(document: dict[str, Any]) -> bytes:
    header = {name: value for name, value in document.items() if name != "secret"}
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def _cipher(passphrase: Hidden[str], salt: bytes, n: int, r: int, p: int) -> aead.AESGCM:
    if not passphrase.value:
        raise KeyFileError("the passphrase is empty. Give one, or None for no encryption.")
    # NFKC: the same characters are the same passphrase, whichever keyboard composed them.
    text = Hidden(unicodedata.normalize("NFKC", passphrase.value).encode("utf-8", "surrogatepass"))
    return aead.AESGCM(Scrypt(salt=salt, length=32, n=n, r=r, p=p).derive(text.value))


def _encrypt(
    document: dict[str, Any], secret: Hidden[bytes], passphrase: Hidden[str]
) -> Hidden[bytes]:
    """The encrypted secret; ``document["encryption"]`` then says how."""
    nonce, salt = secrets.token_bytes(12), secrets.token_bytes(16)
    text = {"nonce": base64.b64encode(nonce).decode(), "salt": base64.b64encode(salt).decode()}
    document["encryption"] = {**_KNOWN, **_SCRYPT, **text}
    cipher = _cipher(passphrase, salt, **_SCRYPT)
    return Hidden(cipher.encrypt(nonce, secret.value, _authenticated(document)))


def _decrypt(
    path: PathLike, document: dict[str, Any], secret: bytes, passphrase: Passphrase
) -> bytes:
    header = document["encryption"]
    if not isinstance(header, dict) or set(header) != {"nonce", "salt", *_KNOWN, *_SCRYPT}:
        raise damaged(path, "not the fields of an encryption header")
    if any(header[name] != value for name, value in _KNOWN.items()):
        raise damaged(path, f"an unknown cipher; known is {_KNOWN}")
    # A file may come from anybody: it must not make us allocate gigabytes or work for hours.
    for name, most in _SCRYPT_MAX.items():
        value, least = header[name], 2 if name == "n" else 1
        if type(value) is not int or not least <= value <= most or value & (value - 1):
            raise damaged(path, f"a scrypt {name} that is no power of two in [{least}, {most}]")
    nonce, salt = (_decode(path, name, header[name]) for name in ("nonce", "salt"))
    if (len(nonce), len(salt)) != (12, 16):
        raise damaged(path, "a nonce or salt of the wrong length")
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
