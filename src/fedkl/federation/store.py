"""Where the private states of many clients live: one small file per client and round, 0600.

A file is never changed. A round that is repeated after a crash starts from the file of the round
before, so what a killed run had written already does not matter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from fedkl.errors import KeyFileError
from fedkl.files import make_folder, read_tensors, write_tensors
from fedkl.key import Key

_PRIVATE: Final = "private/"
_MOMENT: Final = "moment/"
_SPENT: Final = "spent"


def _refuse_to_replace(path: Path, used: bool, what: str) -> None:
    """A new key in place of a lost one would make a trained lock worthless, without a word."""
    if used:
        raise KeyFileError(
            f"{path} is missing, but {what} that started from it. Restore the key from a copy, or "
            "start again in another folder."
        )


@dataclass(frozen=True)
class ClientState:
    """Private state and optimizer moments of a client after round ``round`` (0: never).

    ``spent`` counts the presentations under the pad it has.
    """

    round: int
    private: Mapping[str, Tensor] | None
    moments: Mapping[str, Tensor]
    spent: int = 0

    def __repr__(self) -> str:
        return f"ClientState(round={self.round})"


class ClientStore:
    """Keys and private states below one run folder.

    Args:
        folder: The run's folder; ``keys/`` and ``clients/`` are made below it.
        keyed: Whether clients have keys.
    """

    def __init__(self, folder: Path, *, keyed: bool) -> None:
        self.keys = folder / "keys"
        self.states = folder / "clients"
        self.keyed = keyed
        for path in [self.states, *([self.keys] if keyed else [])]:
            make_folder(path)
            os.chmod(path, 0o700)

    def key(self, client: int) -> Key | None:
        """The client's key; made on first use, from the operating system's randomness."""
        if not self.keyed:
            return None
        path = self.keys / f"client-{client:05d}.key"
        if not path.exists():
            _refuse_to_replace(path, bool(self.rounds(client)), f"client {client} has a lock")
            Key.generate().save(path)
        return Key.load(path)

    def group(self) -> Key:
        """The key that all clients share and the server does not have; made on first use."""
        path = self.keys / "group.key"
        if not path.exists():
            _refuse_to_replace(path, any(self.states.iterdir()), "there are locks")
            Key.generate().save(path)
        return Key.load(path)

    def _folder(self, client: int) -> Path:
        return self.states / f"{client:05d}"

    def rounds(self, client: int) -> list[int]:
        """Rounds after which a state of the client was kept, ascending."""
        try:
            names = os.listdir(self._folder(client))
        except FileNotFoundError:
            return []
        return sorted(int(n[6:-12]) for n in names if n.endswith(".safetensors"))

    def _path(self, client: int, round_: int) -> Path:
        return self._folder(client) / f"round-{round_:06d}.safetensors"

    def load(self, client: int, *, before: int) -> ClientState:
        """The client's state after its last round below ``before``.

        Raises:
            CheckpointError: The file is truncated or was edited.
        """
        past = [r for r in self.rounds(client) if r < before]
        if not past:
            return ClientState(0, None, {})
        tensors, meta = read_tensors(self._path(client, past[-1]))
        private = {n[len(_PRIVATE) :]: t for n, t in tensors.items() if n.startswith(_PRIVATE)}
        moments = {n[len(_MOMENT) :]: t for n, t in tensors.items() if n.startswith(_MOMENT)}
        return ClientState(past[-1], private, moments, int(meta.get(_SPENT, "0")))

    def save(self, client: int, state: ClientState, *, keep: Sequence[int]) -> None:
        """Writes the state after ``state.round``; drops those no checkpoint needs any more.

        Args:
            client: Number of the client.
            state: What to keep.
            keep: Rounds that may still be returned to: the checkpoints' and the best one.
        """
        self._folder(client).mkdir(mode=0o700, exist_ok=True)
        tensors = {_PRIVATE + n: t for n, t in (state.private or {}).items()}
        tensors |= {_MOMENT + n: t for n, t in state.moments.items()}
        # Not synced to the disk one by one: the digest in the file finds a torn write.
        path, meta = self._path(client, state.round), {_SPENT: str(state.spent)}
        write_tensors(path, tensors, meta, private=True, durable=False)
        past = [r for r in self.rounds(client) if r < state.round]
        needed = {max((r for r in past if r <= back), default=0) for back in keep}
        for old in set(past) - needed:
            self._path(client, old).unlink(missing_ok=True)
