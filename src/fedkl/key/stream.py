"""The key stream: pseudorandom values of one key without end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NoReturn, TypeAlias, final

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from fedkl.errors import ConfigError, SecretError

_Bytes: TypeAlias = bytes  # within KeyStream the name ``bytes`` is a method

# Values per call. A lock spec comes from somebody else, and must not make us allocate at will.
MAX_DRAW: Final = 2**28


def refuse(secret: object, *_: object) -> NoReturn:
    """Stands in for the methods by which a secret would be pickled."""
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
        """The next ``n`` bytes. Raises ConfigError unless ``n`` is an integer from 0 to 2**31."""
        if type(n) is not int or not 0 <= n <= 8 * MAX_DRAW:
            raise ConfigError(
                f"cannot take {n!r:.40} bytes of a key stream; ask for an integer from 0 to "
                f"{8 * MAX_DRAW}."
            )
        return self._encryptor.update(bytes(n))

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """float32 of ``shape``, uniform on the multiples of 2**-24 in [0, 1); 4 bytes each."""
        words = np.frombuffer(self.bytes(4 * _count(shape)), dtype="<u4")
        return to_tensor((words >> 8) * 2.0**-24, shape)

    def signs(self, shape: Sequence[int]) -> Tensor:
        """float32 of ``shape``, -1 or 1 with equal chances; 1 bit each, whole bytes per call."""
        count = _count(shape)
        octets = np.frombuffer(self.bytes((count + 7) // 8), dtype=np.uint8)
        return to_tensor(2.0 * np.unpackbits(octets, count=count, bitorder="little") - 1.0, shape)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """float32 of ``shape``, N(0, 1) by Box-Muller on 53-bit uniforms; 16 bytes per pair."""
        count = _count(shape)
        pairs = (count + 1) // 2
        words = np.frombuffer(self.bytes(16 * pairs), dtype="<u8").reshape(pairs, 2) >> 11
        radius = np.sqrt(-2.0 * np.log((words[:, 0] + 1.0) * 2.0**-53))  # (0, 1]: log is finite
        angle = 2.0 * np.pi * (words[:, 1] * 2.0**-53)
        values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return to_tensor(values.reshape(-1)[:count], shape)

    def __repr__(self) -> str:
        return "KeyStream(secret)"

    __reduce_ex__ = __reduce__ = __getstate__ = refuse


LAWS: Final = {"sign": KeyStream.signs, "uniform": KeyStream.uniform, "normal": KeyStream.normal}
"""Laws of a key vector: ±1, uniform on [0, 1) (the paper's), standard normal."""


def _count(shape: Sequence[int]) -> int:
    sizes = tuple(shape)
    if not all(type(n) is int and n >= 0 for n in sizes) or math.prod(sizes) > MAX_DRAW:
        raise ConfigError(
            f"cannot draw values of shape {sizes!s:.80} from a key stream; expected integers "
            f"from 0, and {MAX_DRAW} values at most."
        )
    return math.prod(sizes)


def to_tensor(values: np.ndarray[Any, Any], shape: Sequence[int]) -> Tensor:
    """A float32 copy of ``values`` in ``shape``."""
    return torch.from_numpy(values.astype(np.float32).reshape(tuple(shape)))
