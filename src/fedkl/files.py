"""Atomic files: bytes, JSON and safetensors that are either whole or not there at all.

Everything is written to a temporary file in the same folder, then renamed over the target. The
temporary name starts with ``.fedkl-`` and ends with ``.tmp``, so a leftover of a crash is never
mistaken for the real thing. Tensor files carry a SHA-256 of their contents; it finds accidents,
not forgers: whoever can edit a file can also compute a new digest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedkl.errors import CheckpointError, OutputError, StateError

_DIGEST: Final = "sha256"
_MAX_HEADER: Final = 100 * 2**20  # the format's own limit
_REMEDIES: Final[dict[int, str]] = {
    errno.ENOENT: "Create the folder first or correct the path.",
    errno.ENOTDIR: "A part of the path is a file, not a folder; choose another path.",
    errno.EISDIR: "There is a folder of that name; choose another path or remove it.",
    errno.EEXIST: "Something of that name exists already; choose another path or remove it.",
    errno.EACCES: "Choose a path you may write to, or change its permissions.",
    errno.EPERM: "Choose a path you may write to, or change its permissions.",
    errno.EROFS: "The file system is read-only; choose a path on another one.",
    errno.ENOSPC: "The disk is full; free some space or choose another disk.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
}


def write_bytes(
    path: str | os.PathLike[str],
    data: bytes,
    *,
    private: bool = False,
    durable: bool = True,
    overwrite: bool = True,
) -> None:
    """Write ``data`` to ``path`` atomically: readers see the old file or the new one, whole.

    Args:
        path: file to write; its folder must exist.
        data: the complete contents.
        private: mode 0600 from the very first byte; otherwise 0644, narrowed by the umask.
        durable: wait until file and folder are on the disk, so that a power cut loses nothing.
        overwrite: whether an existing file of that name is replaced.

    Raises:
        OutputError: the file cannot be written, or exists and ``overwrite`` is False (its
            ``__cause__`` is then a FileExistsError). Nothing is left behind.
    """
    target = Path(path)
    temporary = _temporary(target.parent)
    try:
        _create(temporary, data, mode=0o600 if private else 0o644, durable=durable)
        if overwrite:
            os.replace(temporary, target)
        else:
            _move_without_overwriting(temporary, target)
        if durable:
            _sync_folder(target.parent)
    except OSError as error:
        _cannot_write(target, error)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(
    path: str | os.PathLike[str], obj: object, *, private: bool = False, durable: bool = True
) -> None:
    """Write ``obj`` as indented JSON with a trailing newline, atomically; keys keep their order.

    Raises:
        OutputError: the file cannot be written, or ``obj`` holds something JSON has no form for
            (NaN and infinities included); an existing file then stays as it was.
    """
    try:
        text = json.dumps(obj, indent=2, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OutputError(
            f"{path}: cannot be written as JSON ({error}). Expected only dicts with string keys, "
            "lists, strings, booleans, None and finite numbers; write None instead of NaN."
        ) from error
    data = (text + "\n").encode("utf-8", "backslashreplace")
    write_bytes(path, data, private=private, durable=durable)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The contents of a JSON file (UTF-8, finite numbers only).

    Raises:
        CheckpointError: the file is missing, unreadable, or not JSON; says where it breaks off.
    """
    data = _read(path)  # a file that is not there is no broken JSON
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {error}. It was probably cut off or edited; "
            "restore it from a copy or write it again."
        ) from error


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, str] | None = None,
    *,
    private: bool = False,
    durable: bool = True,
) -> None:
    """Write named tensors of any dense shape and device as safetensors, atomically.

    A SHA-256 over names, dtypes, shapes, bytes and ``meta`` goes into the metadata. Tensors that
    share memory are stored separately, so they come back unshared.

    Args:
        path: file to write; its folder must exist.
        tensors: name -> tensor.
        meta: text to keep along with them; the key ``sha256`` is reserved.
        private: mode 0600 instead of 0644 narrowed by the umask.
        durable: wait until the file is on the disk.

    Raises:
        StateError: a name, tensor or metadata entry that safetensors cannot hold.
        OutputError: the file cannot be written.
    """
    plain = _plain(tensors)
    notes = dict(meta or {})
    if _DIGEST in notes or not all(isinstance(x, str) for item in notes.items() for x in item):
        raise StateError(
            f"{path}: metadata must be text under keys other than {_DIGEST!r}, got "
            f"{ {key: type(value).__name__ for key, value in notes.items()} }. "
            "Convert the values with str() or rename the key."
        )
    try:
        data = save(plain, {**notes, _DIGEST: _digest(plain, notes)})
    except (SafetensorError, ValueError, KeyError) as error:
        raise StateError(
            f"{path}: safetensors cannot hold these tensors ({error}). "
            "Convert them to a common dtype such as float32 or int64 first."
        ) from error
    write_bytes(path, data, private=private, durable=durable)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata (without the digest) of a :func:`write_tensors` file.

    Raises:
        CheckpointError: the file is missing, truncated, of another format, or a byte of its
            tensors or metadata differs from what was written.
    """
    data = _read(path)
    try:
        tensors = load(data)
        meta = _metadata(data)
        expected = meta.pop(_DIGEST)
        intact = secrets.compare_digest(_digest(tensors, meta), expected)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is not a whole tensor file of FedKL ({len(data)} bytes; "
            f"{type(error).__name__}: {error}). It was probably cut off or edited; "
            "restore it from a copy or write it again."
        ) from error
    if not intact:
        raise CheckpointError(
            f"{path} was edited or damaged: its SHA-256 is not the one written with it "
            f"({expected[:16]}...). Restore it from a copy or write it again."
        )
    return tensors, meta


def read_meta(path: str | os.PathLike[str]) -> dict[str, str]:
    """Metadata of a :func:`write_tensors` file without its digest; its tensors are not looked at.

    Raises:
        CheckpointError: the file is missing, unreadable or not a tensor file of FedKL.
    """
    try:
        with Path(path).open("rb") as file:
            size = int.from_bytes(start := file.read(8), "little")
            meta = _metadata(start + file.read(min(size, _MAX_HEADER)))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Restore it from a copy."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a whole tensor file of FedKL ({type(error).__name__}: {error}). "
            "It was probably cut off or edited; restore it from a copy."
        ) from error
    meta.pop(_DIGEST, None)
    return meta


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder and its parents where missing, and make sure files can be made in it.

    Raises:
        OutputError: it is a file, below a file, or not writable; says what to do.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise OutputError(
            f"{folder} is a file, expected a folder. Choose another path or move the file away."
        )
    probe = _temporary(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits tell little (root, read-only mounts, quotas): only trying tells.
        _create(probe, b"", mode=0o600, durable=False)
    except FileNotFoundError as error:  # it was just made: file systems such as /proc hold no files
        raise OutputError(
            f"cannot write {folder}: no folder can be made there. Choose another path."
        ) from error
    except OSError as error:
        _cannot_write(folder, error)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return folder


def _temporary(folder: Path) -> Path:
    return folder / f".fedkl-{secrets.token_hex(8)}.tmp"


def _create(path: Path, data: bytes, *, mode: int, durable: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags, mode), "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def _move_without_overwriting(source: Path, target: Path) -> None:
    # A hard link fails when the name is taken, in one step; a check before a rename would race.
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.replace(source, target)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> NoReturn:
    remedy = _REMEDIES.get(error.errno or 0, "Choose another path or mend the cause.")
    raise OutputError(f"cannot write {path}: {error.strerror or error}. {remedy}") from error


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist, expected a file. Check the path, or write it first."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. "
            "Check that it is a file and that you may read it."
        ) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached, dense, contiguous CPU tensors, no two of which share memory."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if name == "__metadata__" or tensor.layout != torch.strided or tensor.is_quantized:
            raise StateError(
                f"tensor {name!r} ({tensor.layout}, {tensor.dtype}) cannot be stored: expected a "
                "dense tensor under a name other than '__metadata__'. Use .to_dense() or rename it."
            )
        # Lazily conjugated or negated views hold other bytes than their values.
        dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        storage = dense.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != dense.nbytes:
            dense = dense.clone()
        seen.add(dense.untyped_storage().data_ptr())
        plain[name] = dense
    return plain


def _digest(tensors: Mapping[str, Tensor], meta: Mapping[str, str]) -> str:
    names = sorted(tensors)
    head = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    text = json.dumps(["fedkl/v1/tensors", head, sorted(meta.items())], separators=(",", ":"))
    # JSON ends where its bracket closes, and dtype and shape fix how many bytes each tensor
    # takes: two different files never hash the same text.
    digest = hashlib.sha256(text.encode())
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size]
    if not header.rstrip(b" ").endswith(b"}"):  # safetensors would also let pass other blanks
        raise ValueError("unexpected bytes behind the header")
    meta: dict[str, str] = json.loads(header)["__metadata__"]
    return meta
