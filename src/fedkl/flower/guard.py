"""The last look at what leaves a client: does it hold a piece of a key or of a private tensor?

Names prove nothing, so bytes are compared. Every secret is laid down in float16, bfloat16, float32
and float64; words of it are indexed, and what leaves is searched for those words at every offset.
A hit counts when the bytes around it agree as well, so that chance does not refuse an honest
update. Zeros, ones and constants are nobody's secret and do not count.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import numpy as np
from torch import Tensor, nn

from fedkl.errors import SecretError
from fedkl.key import Key
from fedkl.locking import affines, is_locked, private_state, shared_state, sources_of
from fedkl.locking.sources import KeyedAffine

_WINDOW: Final = 32  # bytes in a row that count as a piece
_WORD: Final = 8
_SIGNS: Final = 32  # entries of a ±1 key vector that nobody has by chance
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)

_SIDES: Final = ("left", "right")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Places = np.ndarray[Any, Any]


class Secrets:
    """What must not leave. Collect with :meth:`of` or :meth:`tensor` and :meth:`key`."""

    def __init__(self) -> None:
        self._blobs: list[tuple[str, Bytes, int]] = []
        self._signs: list[tuple[str, Bytes, int]] = []
        self._needles: list[tuple[str, bytes]] = []
        self._index: tuple[_Index, _Index] | None = None

    def __repr__(self) -> str:
        return f"Secrets({len(self._blobs)} forms)"

    @classmethod
    def of(cls, model: nn.Module, keys: Iterable[Key | None]) -> Secrets:
        """Keys, key vectors, private tensors, γ and β of a locked model as it is now."""
        found = cls()
        for key in keys:
            if key is not None:
                found.key(key)
        if is_locked(model):
            found.model(model)
        return found

    def model(self, model: nn.Module) -> None:
        """Adds a locked model's private tensors, γ, β and key vectors."""
        shared = list(shared_state(model).values())
        for name, tensor in private_state(model).items():
            self.tensor(name, tensor)
        for name, pair in affines(model).items():
            for kind, tensor in zip(("scale", "shift"), pair, strict=True):
                # A norm whose affine is shared has no secret in it.
                if not any(t.shape == tensor.shape and t.equal(tensor) for t in shared):
                    self.tensor(f"{kind} of {name}", tensor)
        for name, source in sources_of(model).items():
            if isinstance(source, KeyedAffine) and not source.chained:
                self.vector(f"key vector of {name}", source.inputs()[0] / source.factor)

    def tensor(self, name: str, value: Tensor) -> None:
        """Adds a tensor in four number formats. Integers and booleans are not secret."""
        if not value.is_floating_point():
            return
        values = value.detach().cpu().double().reshape(-1).numpy()
        with np.errstate(over="ignore"):  # what float16 cannot hold is not in it
            forms = [values.astype(kind) for kind in ("<f2", "<f4", "<f8")]
        brain = (forms[1].view("<u4") >> 16).astype("<u2")
        for form in [*forms, brain]:
            self._add(name, form.tobytes(), _WINDOW)

    def vector(self, name: str, value: Tensor) -> None:
        """Adds a key vector; one of signs carries a bit an entry, so more of them must agree."""
        values = value.detach().cpu().double().reshape(-1).numpy()
        if not bool((np.abs(values) == np.abs(values[0])).all()):
            self.tensor(name, value)
            return
        for kind in ("<f2", "<f4", "<f8", "i1"):
            form = np.sign(values).astype(kind)
            self._add(name, form.tobytes(), _SIGNS * form.itemsize, signs=True)
        self._add(name, np.packbits(values > 0).tobytes(), 16, signs=True)

    def key(self, key: Key) -> None:
        """Adds the bytes of a key, raw and as text."""
        raw: bytes = key._secret
        text = base64.b64encode(raw)
        halves = [raw[:16], raw[-16:], text[:20], base64.urlsafe_b64encode(raw)[:20]]
        halves += [raw.hex().encode()[:32], raw.hex().upper().encode()[:32]]
        self._needles += [("the key", piece) for piece in halves]

    def _add(self, name: str, data: bytes, window: int, *, signs: bool = False) -> None:
        blob = np.frombuffer(data, np.uint8)
        if len(blob) >= _WORD and (signs or not _plain(blob)):
            (self._signs if signs else self._blobs).append((name, blob, min(window, len(blob))))
            self._index = None

    def found_in(self, data: bytes | Bytes) -> str | None:
        """Name of a secret of which ``data`` holds a piece, or None."""
        hay = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        raw = hay.tobytes()
        for name, needle in self._needles:
            if needle in raw:
                return name
        if self._index is None:
            self._index = _Index(self._blobs), _Index(self._signs)
        values, signs = self._index
        return values.search(hay, values.around) or signs.search(hay, signs.onwards)

    def refuse(self, outgoing: Mapping[str, Any]) -> None:
        """Raises when something that is to leave holds a piece of a secret.

        Args:
            outgoing: What, in words -> array, bytes or text.

        Raises:
            SecretError: Names the place and the secret, and nothing of its value.
        """
        for what, value in outgoing.items():
            if isinstance(value, np.ndarray):
                value = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            elif isinstance(value, str):
                value = value.encode("utf-8", "surrogatepass")
            name = self.found_in(value)
            if name is not None:
                raise SecretError(
                    f"{what} holds a piece of {name}, which is private; nothing was sent. Send "
                    "shared_state(model) only, and no values derived from the lock."
                )


class _Index:
    """Words of secrets by value, and where they are in which secret."""

    def __init__(self, blobs: list[tuple[str, Bytes, int]]) -> None:
        self.blobs = blobs
        words, owners, places = [], [], []
        for owner, (_, blob, window) in enumerate(blobs):
            # Every stretch of `window` bytes contains one of these words whole.
            place = np.arange(0, len(blob) - _WORD + 1, max(window - _WORD, _WORD))
            columns = place[:, None] + np.arange(_WORD)
            word = np.ascontiguousarray(blob[columns]).view("<u8").reshape(-1)
            telling = _telling(word)
            words.append(word[telling])
            places.append(place[telling])
            owners.append(np.full(int(telling.sum()), owner))
        merged = np.concatenate(words) if words else np.zeros(0, np.uint64)
        order = np.argsort(merged, kind="stable")
        self.words = merged[order]
        self.owners = (np.concatenate(owners) if owners else merged)[order]
        self.places = (np.concatenate(places) if places else merged)[order]
        bits = max(16, len(self.words).bit_length() + 4)
        self.shift = np.uint64(64 - bits)
        self.present = np.zeros(2**bits, bool)
        self.present[self._slot(self.words)] = True

    def _slot(self, words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        mixed: np.ndarray[Any, Any] = (words * _MIX) >> self.shift
        return mixed

    def search(self, hay: Bytes, confirm: Callable[[Bytes, Places, int], str | None]) -> str | None:
        """Name of the first secret found in ``hay``; ``confirm`` looks at what is around a word."""
        for offset in range(min(_WORD, len(hay) - _WORD + 1)) if len(self.words) else ():
            words = np.frombuffer(hay, "<u8", (len(hay) - offset) // _WORD, offset)
            hits = np.flatnonzero(self.present[self._slot(words)])
            nearest = np.searchsorted(self.words, words[hits]).clip(max=len(self.words) - 1)
            hits = hits[self.words[nearest] == words[hits]]
            found = words[hits]
            for word in np.unique(found):
                places = offset + _WORD * hits[found == word]
                first, last = (np.searchsorted(self.words, word, side=s) for s in _SIDES)
                for entry in range(int(first), int(last)):
                    if (name := confirm(hay, places, entry)) is not None:
                        return name
        return None

    def around(self, hay: Bytes, places: Places, entry: int) -> str | None:
        """Name of the secret if enough bytes agree on both sides of the word together."""
        name, blob, window = self.blobs[int(self.owners[entry])]
        place = int(self.places[entry])
        for at in places.tolist():
            left = _agreement(hay[:at][::-1], blob[:place][::-1], window)
            if left + _agreement(hay[at:], blob[place:], window) >= window:
                return name
        return None

    def onwards(self, hay: Bytes, places: Places, entry: int) -> str | None:
        """The same from the word on, at many places at once: ±1 is a frequent word."""
        name, blob, window = self.blobs[int(self.owners[entry])]
        piece = blob[int(self.places[entry]) :][:window]
        starts = places[places <= len(hay) - window]
        if len(piece) < window or not len(starts):
            return None
        stretches = np.lib.stride_tricks.sliding_window_view(hay, window)[starts]
        return name if bool((stretches == piece).all(1).any()) else None


def _agreement(a: Bytes, b: Bytes, most: int) -> int:
    """Leading bytes that agree, up to ``most``."""
    length = min(len(a), len(b), most)
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _telling(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Words that are not one float32, or one pair of float16, twice: zeros and constants."""
    rows = np.ascontiguousarray(words).view("<u4").reshape(-1, 2)
    different: np.ndarray[Any, Any] = rows[:, 0] != rows[:, 1]
    return different


def _plain(blob: Bytes) -> bool:
    """Whether the bytes are one number over and over, as fresh statistics and shifts are."""
    for size in (2, 4, 8):
        if len(blob) % size == 0 and (blob.reshape(-1, size) == blob[:size]).all():
            return True
    return False
