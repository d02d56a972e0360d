"""Where the private states of many clients live: one small file per client and round, 0600.

A file is never changed. A round that is repeated after a crash starts from the file of the round
before, so what a killed run had written already does not matter.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from fedkl.errors import KeyFileError
from fedkl.files import make_folder, read_tensors, write_tensors
from fedkl.key import Key
from fedkl.locking.sites import LOCK_NAME

_PRIVATE: Final = "private/"
_MOMENT: Final = "moment/"
_SPENT: Final = "spent"
_KEY: Final = "key/"  # then whose: the client's own, or the group's
OWN, GROUP = "own", "group"


def _refuse_to_replace(path: Path, used: bool, what: str) -> None:
    """A new key in place of a lost one would make a trained lock worthless, without a word."""
    if used:
        raise KeyFileError(
            f"{path} is missing, but {what} that started from it. Restore the key from a copy, or "
            "start again in another folder."
        )


def open_key(path: Path) -> Key:
    """The key of a run's file, which has no passphrase: clients work without anybody to ask.

    Raises:
        KeyFileError: As :meth:`fedkl.key.Key.load`, or the file is encrypted.
    """
    try:
        return Key.load(path)
    except KeyFileError:
        if not _encrypted(path):
            raise
    raise KeyFileError(
        f"{path} is encrypted, but a run takes no passphrase: its keys are files without one. Make "
        "one with 'fedkl keygen' for a client that is new; to go on with this key, put a decrypted "
        "copy in its place (Python: Key.load(file, passphrase=...).save(copy))."
    )


def _encrypted(path: Path) -> bool:
    # Suppressed: a file that is no JSON has a message of its own already.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads(path.read_bytes()).get("encryption") is not None
    return False


def check_key(path: Path, now: str, state: Path, meta: Mapping[str, str], whose: str) -> None:
    """Raises unless ``state`` was made with the key that is there now.

    Args:
        path: The key's file.
        now: Its fingerprint.
        state: File of a client's private state.
        meta: Its metadata. Files of older versions name no key and are believed.
        whose: ``OWN`` or ``GROUP``.

    Raises:
        KeyFileError: It was made with another key; a lock is worth nothing without its own.
    """
    before = meta.get(_KEY + whose, now)
    if before != now:
        raise KeyFileError(
            f"{path} is another key ({now}) than the one that the lock of client "
            f"{int(state.parent.name)} was trained with ({before}, says {state}). Put that key "
            "file back, or start again in another folder."
        )


def check_one(keys: Path) -> None:
    """Raises unless the keys of clients that are in the folder ``keys`` already are the group's.

    Raises:
        KeyFileError: One is another, or cannot be used; or there are such, and no ``group.key``.
    """
    group = keys / "group.key"
    for path in sorted(keys.glob("client-*.key")):
        if not group.exists():
            raise KeyFileError(
                f"{group} is missing, but there is {path}, and with --one-key all clients have "
                "that one. Put the key that they are to have there, or run without --one-key."
            )
        _refuse_another(path, open_key(path), group, open_key(group))


def _refuse_another(path: Path, key: Key, whole: Path, group: Key) -> None:
    if key != group:
        raise KeyFileError(
            f"{path} is key {key.fingerprint}, and all clients are to have one, "
            f"{group.fingerprint} ({whole}); put a copy of that in its place, or run without "
            "--one-key."
        )


def _give(path: Path, group: Key) -> None:
    """Makes the file of a client that has the group's key: a link, or a copy without links."""
    try:
        path.symlink_to("group.key")
    except FileExistsError:  # another process was faster
        pass
    except OSError:  # a file system, or a user, without links
        group.save(path)


@dataclass(frozen=True)
class ClientState:
    """Private state and optimizer moments of a client after round ``round`` (0: never).

    ``spent`` counts the presentations under the pad it has; of one key, those of all clients.
    """

    round: int
    private: Mapping[str, Tensor] | None
    moments: Mapping[str, Tensor]
    spent: int = 0

    @property
    def epoch(self) -> int:
        """Of the pad that it goes with; 0 for other locks."""
        private = self.private or {}
        epochs = [int(t) for n, t in private.items() if n.split(".")[-2:] == [LOCK_NAME, "epoch"]]
        return max(epochs, default=0)

    def __repr__(self) -> str:
        return f"ClientState(round={self.round})"


class ClientStore:
    """Keys and private states below one run folder.

    Args:
        folder: The run's folder; ``keys/`` and ``clients/`` are made below it.
        keyed: Whether clients have keys.
        one: Whether they all have the group's: a client's file is then a link to it.
    """

    def __init__(self, folder: Path, *, keyed: bool, one: bool = False) -> None:
        self.keys = folder / "keys"
        self.states = folder / "clients"
        self.keyed = keyed
        self.one = keyed and one
        # Fingerprint and file of every key besides the client's own that states are made with.
        self.known: dict[str, tuple[str, Path]] = {}
        for path in [self.states, *([self.keys] if keyed else [])]:
            make_folder(path)
            os.chmod(path, 0o700)

    def key(self, client: int) -> Key | None:
        """The client's key; made on first use, from the operating system's randomness.

        Raises:
            KeyFileError: It cannot be read, is gone though there is a lock, or is not the one that
                all clients are to have; or it is, and they are to have their own.
        """
        if not self.keyed:
            return None
        path, group = self._key_path(client), self.group() if self.one else None
        if not path.exists():
            if group is None:
                _refuse_to_replace(path, bool(self.rounds(client)), f"client {client} has a lock")
                Key.generate().save(path)
            else:  # a state that was made with another key says so itself
                _give(path, group)
        key, whole = open_key(path), self.keys / "group.key"
        if group is not None:
            _refuse_another(path, key, whole, group)
        elif whole.exists() and filecmp.cmp(path, whole, shallow=False):
            raise KeyFileError(
                f"{path} is the key that all clients have ({whole}), so its lock would be "
                "everybody's and counted for one; give the client a key of its own, or run with "
                "--one-key."
            )
        return key

    def _key_path(self, client: int) -> Path:
        return self.keys / f"client-{client:05d}.key"

    def group(self) -> Key:
        """The key that all clients share and the server does not have; made on first use."""
        path = self.keys / "group.key"
        if not path.exists():
            _refuse_to_replace(path, any(self.states.iterdir()), "there are locks")
            if self.one:
                check_one(self.keys)
            Key.generate().save(path)
        key = open_key(path)
        self.known[GROUP] = (key.fingerprint, path)
        return key

    def _made_with(self, client: int) -> dict[str, tuple[str, Path]]:
        key = self.key(client)
        own = {} if key is None else {OWN: (key.fingerprint, self._key_path(client))}
        return {**self.known, **own}

    def folder(self, client: int) -> Path:
        """Where the client's private states are; made when the first is saved."""
        return self.states / f"{client:05d}"

    def rounds(self, client: int) -> list[int]:
        """Rounds after which a state of the client was kept, ascending."""
        try:
            names = os.listdir(self.folder(client))
        except FileNotFoundError:
            return []
        return sorted(int(n[6:-12]) for n in names if n.endswith(".safetensors"))

    def _path(self, client: int, round_: int) -> Path:
        return self.folder(client) / f"round-{round_:06d}.safetensors"

    def load(self, client: int, *, before: int) -> ClientState:
        """The client's state after its last round below ``before``.

        Raises:
            CheckpointError: The file is truncated or was edited.
            KeyFileError: The client's key or the group's is not the one it was made with.
        """
        past = [r for r in self.rounds(client) if r < before]
        if not past:
            return ClientState(0, None, {})
        path = self._path(client, past[-1])
        tensors, meta = read_tensors(path)
        for whose, (now, key) in self._made_with(client).items():
            check_key(key, now, path, meta, whose)
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
        self.folder(client).mkdir(mode=0o700, exist_ok=True)
        tensors = {_PRIVATE + n: t for n, t in (state.private or {}).items()}
        tensors |= {_MOMENT + n: t for n, t in state.moments.items()}
        # Not synced to the disk one by one: the digest in the file finds a torn write.
        path, meta = self._path(client, state.round), {_SPENT: str(state.spent)}
        meta |= {_KEY + whose: now for whose, (now, _) in self._made_with(client).items()}
        write_tensors(path, tensors, meta, private=True, durable=False)
        past = [r for r in self.rounds(client) if r < state.round]
        needed = {max((r for r in past if r <= back), default=0) for back in keep}
        for old in set(past) - needed:
            self._path(client, old).unlink(missing_ok=True)
