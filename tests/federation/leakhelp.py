"""Looks for secrets in bytes: every stretch of 16 bytes of every tensor, in three number formats.

Every aligned eight bytes of a secret are looked up at every offset of the haystack, so that any
stretch of sixteen bytes is found wherever it starts. Eight bytes that anybody has, zeros and ones,
do not count.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkl.federation import RunConfig, Workspace
from fedkl.federation.session import Session
from fedkl.files import read_tensors
from fedkl.key import Key
from fedkl.locking import affines, restart_lock
from fedkl.rng import derive

FORMATS = (np.dtype("<f2"), np.dtype("<f4"), np.dtype("<f8"))
_RUN = 32  # entries of a key vector of ±1 that no other data has by chance


@dataclass
class Secrets:
    """Names of secrets by the eight bytes, or the needle, that gives them away."""

    words: dict[int, str] = field(default_factory=dict)
    needles: dict[bytes, str] = field(default_factory=dict)
    _sorted: np.ndarray[Any, Any] | None = None

    def tensor(self, name: str, value: Tensor) -> None:
        """Adds the values of a tensor in every format."""
        values = value.detach().double().reshape(-1).numpy()
        for kind in FORMATS:
            per = 8 // kind.itemsize
            whole = np.ascontiguousarray(values[: len(values) // per * per].astype(kind))
            rows = whole.reshape(-1, per)
            telling = (rows != 0).all(1) & (np.abs(rows) != 1).all(1)
            if per > 1:
                telling &= (rows != rows[:, :1]).any(1)
            for word in rows[telling].copy().view("<u8").reshape(-1).tolist():
                self.words.setdefault(word, f"{name} {kind.name}")
        if len(values) > 1 and values[0] not in (0, 1) and value.is_floating_point():
            text = json.dumps([float(v) for v in values[:2]])[1:-1]
            self.needles.setdefault(text.encode(), f"{name} text")

    def vector(self, name: str, value: Tensor) -> None:
        """Adds a key vector: ±1 carries one bit an entry, so longer stretches are needed."""
        values = value.detach().double().numpy()
        for start in range(0, len(values) - _RUN + 1, _RUN):
            part = values[start : start + _RUN]
            for kind in (*FORMATS, np.dtype("i1")):
                self.needles.setdefault(part.astype(kind).tobytes(), f"{name} {kind.name}")
        for start in range(0, len(values) - 2 * _RUN + 1, 2 * _RUN):
            bits = np.packbits(values[start : start + 2 * _RUN] > 0)
            self.needles.setdefault(bits.tobytes(), f"{name} bits")

    def key(self, name: str, key: Key) -> None:
        """Adds the bytes of a key, raw and as text, and its vector."""
        raw: bytes = key._secret
        encoded = base64.b64encode(raw)
        for form, needle in {
            "raw": raw[:16],
            "raw end": raw[16:],
            "hex": raw.hex().encode()[:32],
            "HEX": raw.hex().upper().encode()[:32],
            "base64": encoded[:20],
            "base64url": base64.urlsafe_b64encode(raw)[:20],
        }.items():
            self.needles.setdefault(needle, f"{name} {form}")

    def found_in(self, data: bytes) -> set[str]:
        """Names of the secrets of which ``data`` holds a piece."""
        found = {name for needle, name in self.needles.items() if needle in data}
        if self._sorted is None or len(self._sorted) != len(self.words):
            self._sorted = np.array(sorted(self.words), dtype=np.uint64)
        for offset in range(min(8, max(0, len(data) - 7))):
            words = np.frombuffer(data, "<u8", (len(data) - offset) // 8, offset)
            places = np.searchsorted(self._sorted, words).clip(max=len(self._sorted) - 1)
            hits = words[self._sorted[places] == words]
            found |= {self.words[int(word)] for word in hits}
        return found


def secrets_of(folder: Path, config: RunConfig, session: Session) -> Secrets:
    """Every secret of every client of a run: keys, vectors, private tensors, moments, γ and β."""
    secrets = Secrets()
    shared = session.initial()
    for path in sorted((folder / "keys").glob("*.key")):
        key = Key.load(path)
        secrets.key("key", key)
        secrets.vector("vector", key.vector(config.defense.length or 1024, "sign"))
        if session.workspace.group is None:
            continue
        restart_lock(session.workspace.model, key, session.workspace.group)
        start_of_the_lock(secrets, session.workspace)
    for path in sorted((folder / "clients").rglob("*.safetensors")):
        tensors, _ = read_tensors(path)
        for name, tensor in tensors.items():
            kind = "moment" if name.startswith("moment/") else kind_of(name)
            secrets.tensor(kind, tensor)
        client = int(path.parent.name)
        private = {n[8:]: t for n, t in tensors.items() if n.startswith("private/")}
        session.workspace.enter(shared, session.store.key(client), private)
        for gamma, beta in affines(session.workspace.model).values():
            secrets.tensor("gamma", gamma)
            secrets.tensor("beta", beta)
    return secrets


def start_of_the_lock(secrets: Secrets, space: Workspace) -> None:
    """Where all locks begin is a secret of the group."""
    for name, tensor in space.private.items():
        if "keylock" in name:
            secrets.tensor("start", tensor)
    for gamma, beta in affines(space.model).values():
        secrets.tensor("start gamma", gamma)
        secrets.tensor("start beta", beta)


def kind_of(name: str) -> str:
    return name.rpartition(".")[2]


def as_format(value: Tensor, name: str) -> Tensor:
    return value.to({"float16": torch.half, "float32": torch.float}.get(name, torch.double))


def noise(seed: int, count: int) -> bytes:
    return torch.randn(count, generator=derive(seed, "noise")).numpy().tobytes()


def everything_below(folder: Path) -> Mapping[str, bytes]:
    """Every file of a run that is not for the client's eyes alone."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in ("keys", "clients")
    }
