"""The momentum of Flower's server-side optimizers, kept so that a restart goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flwr.serverapp.strategy import FedAvgM
from flwr.serverapp.strategy.fedopt import FedOpt
from torch import Tensor

from fedkl.errors import CheckpointError
from fedkl.federation.checkpoint import Checkpoints
from fedkl.files import make_folder, read_tensors, write_tensors


class Moments:
    """Saves and restores what a strategy remembers between rounds, one file per round.

    Args:
        strategy: A strategy of Flower, or a wrapper around one; those without a momentum of their
            own have nothing to keep.
        folder: The run's, with its checkpoints; the files go to ``strategy/`` below it.
    """

    def __init__(self, strategy: Any, folder: Path) -> None:
        self._strategy = getattr(strategy, "strategy", strategy)
        self._folder = folder / "strategy"
        self._checkpoints = Checkpoints(folder / "checkpoints")

    def _path(self, round_: int) -> Path:
        return self._folder / f"round-{round_:06d}.safetensors"

    def save(self, round_: int) -> None:
        """Keeps the momentum after ``round_``; drops those that no checkpoint needs any more."""
        found: dict[str, Tensor] = {}
        if isinstance(self._strategy, FedOpt):
            for name in ("m_t", "v_t"):
                values = getattr(self._strategy, name) or {}
                found |= {f"{name}/{key}": torch.from_numpy(v) for key, v in values.items()}
        elif isinstance(self._strategy, FedAvgM):
            for number, value in enumerate(self._strategy.momentum_vector or []):
                found[f"momentum/{number}"] = torch.from_numpy(value)
        if not found:
            return
        make_folder(self._folder)
        write_tensors(self._path(round_), found, {"round": str(round_)})
        # A checkpoint of this round may follow, and is then one more to go on from.
        needed = {round_, *(r for r in self._checkpoints.rounds() if r < round_)}
        keep = {self._path(r) for r in needed}
        for path in self._folder.glob("round-*.safetensors"):
            if path not in keep:
                path.unlink()

    def restore(self, round_: int) -> None:
        """Gives a fresh strategy what it remembered after ``round_``.

        Raises:
            CheckpointError: The file is missing or damaged.
        """
        if round_ == 0 or not self._forgot():
            return
        path = self._path(round_)
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing: the momentum of {type(self._strategy).__name__} after round "
                f"{round_}, without which the rounds after it would come out differently. Go on "
                "with the strategy that the run began with, restore the file from a copy, or start "
                "again in another folder."
            )
        tensors, _ = read_tensors(path)
        parts: dict[str, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            kind, _, key = name.partition("/")
            parts.setdefault(kind, {})[key] = tensor.numpy()
        try:
            self._give(parts)
        except KeyError as error:
            raise CheckpointError(
                f"{path} is not the momentum of {type(self._strategy).__name__}: it lacks {error}. "
                "Go on with the strategy that the run began with, or start again in another folder."
            ) from error

    def _forgot(self) -> bool:
        """Whether the strategy has a momentum, and nothing in it."""
        if isinstance(self._strategy, FedOpt):
            return not self._strategy.m_t
        if isinstance(self._strategy, FedAvgM):
            return self._strategy.server_momentum > 0 and self._strategy.momentum_vector is None
        return False

    def _give(self, parts: dict[str, dict[str, Any]]) -> None:
        if isinstance(self._strategy, FedOpt):
            self._strategy.m_t, self._strategy.v_t = parts["m_t"], parts["v_t"]
        else:
            values = parts["momentum"]
            self._strategy.momentum_vector = [values[str(n)] for n in range(len(values))]
