"""Tensors as Flower's records and back, without trusting what the other side claims."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedkl.errors import StateError
from fedkl.locking import state_problems

ARRAYS: Final = "arrays"
CONFIG: Final = "config"
METRICS: Final = "metrics"
EXAMPLES: Final = "num-examples"
VECTOR: Final = "shared"
SEALED: Final = "sealed"
_HEADER: Final = 4096  # bytes that numpy's header of one array may take
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    str(np.dtype(name)): getattr(torch, name)
    for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")
} | {"bool": torch.bool}


def encoded(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Named tensors as an array record.

    Raises:
        StateError: A dtype that numpy does not have.
    """
    record = ArrayRecord()
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
            raise StateError(
                f"{name} is {tensor.dtype}, which Flower cannot carry; expected one of "
                f"{', '.join(_DTYPES)}. Convert the model first, for example with .float()."
            )
        record[name] = Array(tensor.detach().cpu().contiguous().numpy())
    return record


def decoded(record: ArrayRecord, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``record``, which must have exactly the names, shapes and dtypes of ``like``.

    Nothing is allocated before everything that is claimed has been checked.

    Raises:
        StateError: Names, shapes, dtypes or sizes differ; all differences at once.
    """
    claims = {name: _claimed(array) for name, array in record.items()}
    problems = [f"{name} claims to be {c}" for name, c in claims.items() if isinstance(c, str)]
    if problems := problems or state_problems(like, claims):
        raise StateError("; ".join(problems))
    # In the order of `like`, whatever order they came in: sums depend on nothing else then.
    return {name: torch.from_numpy(_values(name, record[name])) for name in like}


def _claimed(array: Any) -> Any:
    """What the array says it is, as a tensor without storage; text where it cannot be one."""
    dtype = _DTYPES.get(array.dtype)
    shape = tuple(array.shape)
    if dtype is None or array.stype != "numpy.ndarray" or not all(0 <= n < 2**62 for n in shape):
        return f"{array.stype} of {array.dtype} with shape {shape}"
    if math.prod(shape) >= 2**60:
        return f"{array.dtype} with shape {shape}"
    return torch.empty(shape, dtype=dtype, device="meta")


def _values(name: str, array: Any) -> Any:
    shape, dtype = tuple(array.shape), np.dtype(array.dtype)
    size = math.prod(shape) * dtype.itemsize
    if not size <= len(array.data) <= size + _HEADER:
        raise StateError(f"{name} has {len(array.data)} bytes, expected {size} and a short header")
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        found, fortran, kind = read(stream)
    except (ValueError, EOFError, SyntaxError) as error:
        raise StateError(f"{name} is not a numpy array ({error})") from error
    body = array.data[stream.tell() :]
    if found != shape or kind != dtype or len(body) != size or (fortran and len(shape) > 1):
        raise StateError(
            f"{name} holds {kind} of shape {found} in {len(body)} bytes, but claims {dtype} of "
            f"shape {shape} in C order"
        )
    return np.frombuffer(body, dtype).reshape(shape).copy()


def _floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # By name: a state that comes from a checkpoint is in another order than a model's.
    return {n: tensors[n] for n in sorted(tensors) if tensors[n].is_floating_point()}


def packed(tensors: Mapping[str, Tensor]) -> Tensor:
    """All floating-point tensors by name, end to end, (total,); float64 if one is, else float32."""
    floats = _floats(tensors).values()
    wide = any(t.dtype == torch.float64 for t in floats)
    dtype = torch.float64 if wide else torch.float32
    return torch.cat([t.detach().cpu().reshape(-1).to(dtype) for t in floats])


def packed_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """:func:`packed` as a record of one array."""
    return encoded({VECTOR: packed(tensors)})


def unpacked(
    record: ArrayRecord, like: Mapping[str, Tensor], *, exact: bool = True
) -> dict[str, Tensor]:
    """Inverse of :func:`packed_record`. What is not floating point is copied from ``like``.

    Args:
        record: One vector.
        like: Names, shapes and dtypes.
        exact: Require the dtype of :func:`packed`; else any floating-point one.

    Raises:
        StateError: It is no such vector.
    """
    want = packed(like)
    if not exact:
        kinds = [_DTYPES.get(a.dtype, want.dtype) for a in record.values()]
        want = want.to(kinds[0]) if kinds and kinds[0].is_floating_point else want
    return split(decoded(record, {VECTOR: want})[VECTOR], like)


def split(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vector of :func:`packed` cut into tensors like those of ``like``."""
    floats = _floats(like)
    parts = torch.split(vector, [t.numel() for t in floats.values()])
    found = {
        name: part.reshape(tensor.shape).to(tensor.dtype)
        for (name, tensor), part in zip(floats.items(), parts, strict=True)
    }
    return {name: found[name] if name in found else like[name].clone() for name in like}
