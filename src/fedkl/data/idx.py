"""The IDX files of MNIST and its kin, plain or gzipped."""

from __future__ import annotations

import gzip
import struct
import zlib
from math import prod
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fedkl.errors import DataError, number_of

IDX_FILES: Final = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def find_idx(folder: Path) -> list[Path] | None:
    """The four files in ``folder``, plain or ``.gz``, in the order of ``IDX_FILES``.

    Returns:
        ``None`` when not a single one is there.

    Raises:
        DataError: some are there and some are missing.
    """
    found = {
        name: next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        for name in IDX_FILES
    }
    paths = [path for path in found.values() if path is not None]
    if len(paths) < len(IDX_FILES) and paths:
        missing = ", ".join(name for name, path in found.items() if path is None)
        raise DataError(f"folder {folder} lacks {missing} (with or without .gz).")
    return paths or None


def read_idx(path: Path, ndim: int) -> Tensor:
    """The bytes of an IDX file as a uint8 tensor with ``ndim`` dimensions.

    Raises:
        DataError: not gzip although it ends in ``.gz``, no IDX file of bytes with ``ndim``
            dimensions, or shorter or longer than its header says.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"file {path} cannot be read ({error}). Get it again.") from error
    magic, header = bytes((0, 0, 8, ndim)), 4 + 4 * ndim
    if data[:4] != magic:
        raise DataError(
            f"file {path} begins with {data[:4].hex() or 'nothing'}, expected {magic.hex()}: "
            f"an IDX file of bytes with {ndim} dimension(s)."
        )
    if len(data) < header:
        raise DataError(f"file {path} is truncated within its header. Get it again.")
    shape = struct.unpack(f">{ndim}I", data[4:header])
    if len(data) - header != prod(shape) or prod(shape) == 0:
        raise DataError(
            f"file {path} has {len(data) - header} bytes of data, expected {prod(shape)} "
            f"(more than 0) for its shape {shape}. Get it again."
        )
    return torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8).view(shape)


def read_pair(images: Path, labels: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 1, h, w) and labels int64 (N,) below ``classes``.

    Raises:
        DataError: a file is damaged, the counts differ, or a label is out of range.
    """
    x, y = read_idx(images, 3), read_idx(labels, 1)
    if len(x) != len(y):
        raise DataError(
            f"{images} has {number_of(len(x), 'image')}, {labels} {number_of(len(y), 'label')}."
        )
    if int(y.max()) >= classes:
        raise DataError(f"file {labels} has label {int(y.max())}, expected 0 to {classes - 1}.")
    return x.unsqueeze(1), y.to(torch.int64)
