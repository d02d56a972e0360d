"""The momentum of Flower's server-side optimizers, kept so that a restart goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from flwr.serverapp.strategy import FedAvgM
from flwr.serverapp.strategy.fedopt import FedOpt
from torch import Tensor

from fedkl.files import make_folder, read_tensors, write_tensors

_KEPT: Final = 3  # rounds: the two of the checkpoints, and one that a checkpoint may yet follow


class Moments:
    """Saves and restores what a strategy remembers between rounds, one file per round.

    Args:
        strategy: A strategy of Flower, or a wrapper around one; those without a momentum of their
            own have nothing to keep.
        folder: Where to keep the files.
    """

    def __init__(self, strategy: Any, folder: Path) -> None:
        self._strategy = getattr(strategy, "strategy", strategy)
        self._folder = folder

    def _path(self, round_: int) -> Path:
        return self._folder / f"round-{round_:06d}.safetensors"

    def save(self, round_: int) -> None:
        """Keeps the momentum after ``round_``; drops those of long ago, and any later one."""
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
        keep = {self._path(r) for r in range(round_ - _KEPT + 1, round_ + 1)}
        for path in self._folder.glob("round-*.safetensors"):
            if path not in keep:
                path.unlink()

    def restore(self, round_: int) -> None:
        """Gives a fresh strategy what it remembered after ``round_``, if that was kept.

        Raises:
            CheckpointError: The file is damaged.
        """
        if not self._path(round_).exists():
            return
        tensors, _ = read_tensors(self._path(round_))
        parts: dict[str, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            kind, _, key = name.partition("/")
            parts.setdefault(kind, {})[key] = tensor.numpy()
        if isinstance(self._strategy, FedOpt) and not self._strategy.m_t:
            self._strategy.m_t, self._strategy.v_t = parts["m_t"], parts["v_t"]
        elif isinstance(self._strategy, FedAvgM) and self._strategy.momentum_vector is None:
            values = parts["momentum"]
            self._strategy.momentum_vector = [values[str(n)] for n in range(len(values))]
