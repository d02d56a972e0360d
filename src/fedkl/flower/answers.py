"""What a client has answered: a pad answers every question once, whatever its number.

Private states go by round, and the round is the server's word. A server that asks for a round again
with other weights, or for one of long ago, would have another answer under a pad that is counted
once, or was renewed away. So the client keeps a record of its own, which only grows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fedkl.errors import CheckpointError, FederationError
from fedkl.federation.store import ClientStore
from fedkl.files import read_json, write_json

try:
    import fcntl
except ImportError:  # Windows: two clients must not start in one folder at the same time there
    fcntl = None  # type: ignore[assignment]

_NAME: Final = "answered.json"
_WHY: Final = (
    "One more answer under that pad would be counted nowhere, so nothing was sent. A restarted "
    "server repeats rounds as they were; else it must go on"
)
_AFRESH: Final = "If it has lost its run, begin again here too, with an empty folder and a new key."


@dataclass(frozen=True)
class Answer:
    """What one round was answered with.

    Attributes:
        digest: Of the question: global state and settings.
        base: Round of the private state that the answer started from (0: none).
        epoch: Of the pad.
        spent: Presentations under that pad so far, this round's included; 0 where none are counted.
    """

    digest: str
    base: int
    epoch: int
    spent: int = 0


class Answers:
    """The record of one client, next to its private states (``answered.json``, 0600).

    Read it, answer and :meth:`add` within :func:`alone`.

    Args:
        store: Of the private states.
        client: Number of the client.

    Raises:
        CheckpointError: The record is damaged.
    """

    def __init__(self, store: ClientStore, client: int) -> None:
        self.client = client
        self.path = store.folder(client) / _NAME
        self._answers: dict[int, Answer] = {}
        before = max(store.rounds(client), default=0)
        if self.path.exists():
            before = self._read()
        # States without a record are of an older version: what they answered is not known.
        self._before = before
        if not self.path.exists():
            self._write()

    def _read(self) -> int:
        found = read_json(self.path)
        try:
            self._answers = {int(r): Answer(**facts) for r, facts in found["rounds"].items()}
            return int(found["before"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path} is no record of answered rounds ({error!r}); restore it from a copy, "
                "or start again in another folder with a new key."
            ) from error

    def _write(self) -> None:
        rounds = {str(r): dataclasses.asdict(answer) for r, answer in self._answers.items()}
        write_json(self.path, {"before": self._before, "rounds": rounds}, private=True)

    @property
    def last(self) -> int:
        """The highest round that was answered (0: none)."""
        return max(self._answers, default=self._before)

    @property
    def epoch(self) -> int:
        """The highest epoch of a pad that answered."""
        return max((answer.epoch for answer in self._answers.values()), default=0)

    def check_question(self, round_: int, digest: str) -> None:
        """Raises unless round ``round_`` is a new one, or the very question that it was before.

        Args:
            round_: As the server says.
            digest: Of the question.

        Raises:
            FederationError: It was answered for another question, or is below the last one.
        """
        if round_ > self.last:
            return
        known = self._answers.get(round_)
        if known is None:
            raise FederationError(
                f"client {self.client}: got round {round_}, which is not on record, but rounds up "
                f"to {self.last} are answered; expected round {self.last + 1} or later. {_WHY} "
                f"with round {self.last + 1}. {_AFRESH}"
            )
        if known.digest != digest:
            raise FederationError(
                f"client {self.client}: got round {round_} again with another global state or "
                f"other settings, expected those it was answered for. {_WHY} with round "
                f"{self.last + 1}. {_AFRESH}"
            )

    def check_pad(self, round_: int, base: int, epoch: int) -> None:
        """Raises unless round ``round_`` gets a pad that may answer it.

        Args:
            round_: A round that :meth:`check_question` let through.
            base: Round of the private state that it starts from (0: none).
            epoch: Of the pad.

        Raises:
            FederationError: A repeated round would start from another state or get another pad
                than before; or a new one from a state, or under a pad, of before the last round.
        """
        known = self._answers.get(round_)
        if known is not None and (base, epoch) != (known.base, known.epoch):
            raise FederationError(
                f"client {self.client}: round {round_} again would be answered from the private "
                f"state after round {base} under pad {epoch}, expected {known.base} and "
                f"{known.epoch} as before (that state is gone, or the renewal of pads was set "
                f"differently). {_WHY} with round {self.last + 1}. {_AFRESH}"
            )
        if known is None and (base < self.last or epoch < self.epoch):
            raise FederationError(
                f"client {self.client}: round {round_} would be answered from the private state "
                f"after round {base} under pad {epoch}, expected {self.last} and at least "
                f"{self.epoch}: no pad is used again. Restore {self.path.parent} from a copy, or "
                "start again in another folder with a new key."
            )

    def add(self, round_: int, answer: Answer) -> None:
        """Puts on record, and on the disk, that ``round_`` gets ``answer``; then it may leave."""
        self._answers[round_] = answer
        self._write()


def digest_of(facts: object, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of plain data and of named tensors, bit for bit, as hex digits."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time works in ``folder``, which is made if need be (0700)."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(folder / ".node", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
