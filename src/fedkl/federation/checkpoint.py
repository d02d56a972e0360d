"""Checkpoints: tensors first, then a JSON file that makes them count. Both carry digests."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fedkl.errors import CheckpointError
from fedkl.files import make_folder, read_json, read_tensors, write_json, write_tensors

_KEEP: Final = 2
_BEST: Final = "best.safetensors"
_SEALED: Final = "sealed/"  # then the client that did
_NAME: Final = re.compile(r"round-(\d{6,})\.json")


@dataclass(frozen=True)
class Checkpoint:
    """State of a federation after ``round`` rounds; nothing private is in it.

    Attributes:
        round: Last finished round.
        shared: Global shared state.
        server: The server's own tensors (momentum of fedsgd).
        facts: Plain data: counts, best validation accuracy, after which round each client kept a
            private state, and private layers that clients sealed.
    """

    round: int
    shared: Mapping[str, Tensor]
    server: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    @property
    def sealed(self) -> dict[str, str]:
        """Client → private layers that it sealed in that round; empty where clients keep them."""
        return dict(self.facts.get("sealed") or {})


class Checkpoints:
    """The folder ``checkpoints/`` of a run; keeps the newest two and the best."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # made by the first that is saved: looking leaves no trace

    def _stem(self, round_: int) -> Path:
        return self.folder / f"round-{round_:06d}"

    def rounds(self) -> list[int]:
        """Rounds with a committed checkpoint, valid or not, ascending."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def save(self, checkpoint: Checkpoint) -> None:
        """Commits ``checkpoint``; drops those older than the one before, and any newer one.

        A newer one is damaged, or the run would have gone on from there.
        """
        make_folder(self.folder)
        stem = self._stem(checkpoint.round)
        tensors = {f"shared/{n}": t for n, t in checkpoint.shared.items()}
        tensors |= {f"server/{n}": t for n, t in checkpoint.server.items()}
        write_tensors(stem.with_suffix(".safetensors"), tensors, {"round": str(checkpoint.round)})
        facts = {"round": checkpoint.round, **checkpoint.facts}
        write_json(stem.with_suffix(".json"), {**facts, "sha256": _digest(facts)})
        rounds = self.rounds()
        keep = [r for r in rounds if r <= checkpoint.round][-_KEEP:]
        for old in set(rounds) - set(keep):
            self._stem(old).with_suffix(".json").unlink(missing_ok=True)
            self._stem(old).with_suffix(".safetensors").unlink(missing_ok=True)

    def save_best(self, checkpoint: Checkpoint) -> None:
        """Keeps ``checkpoint``'s shared state, and what was sealed, as ``best.safetensors``."""
        make_folder(self.folder)
        # As tensors: the metadata of a file has an end at 100 MB.
        sealed = {
            _SEALED + client: torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)
            for client, text in checkpoint.sealed.items()
        }
        facts = {
            "round": str(checkpoint.round),
            "own_key": str(checkpoint.facts["best"]["own_key"]),
        }
        write_tensors(self.folder / _BEST, {**checkpoint.shared, **sealed}, facts)

    def load_best(self) -> Checkpoint:
        """What :meth:`save_best` kept: round, shared state, and what was sealed among the facts.

        Raises:
            CheckpointError: It is missing, truncated or edited; the message names the file.
        """
        shared, meta = read_tensors(self.folder / _BEST)
        sealed = {
            name.removeprefix(_SEALED): shared.pop(name).numpy().tobytes().decode("utf-8")
            for name in [n for n in shared if n.startswith(_SEALED)]
        }
        return Checkpoint(int(meta["round"]), shared, {}, {"sealed": sealed})

    def load(self, round_: int) -> Checkpoint:
        """The checkpoint of one round.

        Raises:
            CheckpointError: It is missing, truncated or edited; the message names the file.
        """
        stem = self._stem(round_)
        facts = read_json(stem.with_suffix(".json"))
        digest = facts.pop("sha256", None) if isinstance(facts, dict) else None
        if digest is None or digest != _digest(facts):
            raise CheckpointError(
                f"{stem.with_suffix('.json')} does not match its digest: it was edited or damaged; "
                "delete it to go on from the checkpoint before."
            )
        tensors, meta = read_tensors(stem.with_suffix(".safetensors"))
        if meta.get("round") != str(round_):
            raise CheckpointError(
                f"{stem.with_suffix('.safetensors')} belongs to round {meta.get('round')}, "
                f"not {round_}; delete it to go on from the checkpoint before."
            )
        parts: dict[str, dict[str, Tensor]] = {"shared": {}, "server": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        facts.pop("round")
        return Checkpoint(round_, parts["shared"], parts["server"], facts)

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest valid checkpoint, and one message for every damaged one passed over.

        Raises:
            CheckpointError: There are checkpoints and all are damaged.
        """
        problems: list[str] = []
        for round_ in reversed(self.rounds()):
            try:
                return self.load(round_), problems
            except CheckpointError as error:
                problems.append(f"checkpoint of round {round_} not used: {error}")
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used: {' '.join(problems)} "
                "Start again without --resume, into another folder."
            )
        return None, problems


def _digest(facts: Mapping[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
