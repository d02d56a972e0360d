"""The one aggregate, and what the server refuses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedkl.errors import FederationError, UpdateError
from fedkl.federation.client import Update
from fedkl.locking import state_problems


def check_update(update: Update, expected: Mapping[str, Tensor]) -> None:
    """Refuses an update that does not fit the global state or is not finite.

    Raises:
        UpdateError: Names the client and the first offending tensor.
    """
    problems = state_problems(expected, update.tensors)
    if update.examples < 1:
        problems.append(f"it claims {update.examples} examples")
    if not problems:
        for name, tensor in update.tensors.items():
            if _averaged(tensor) and not bool(torch.isfinite(tensor).all()):
                problems.append(f"{name} holds NaN or infinity")
                break
    if problems:
        raise UpdateError(
            f"update of client {update.client} in round {update.round} refused: "
            f"{'; '.join(problems)}. Lower its learning rate or check its model."
        )


@dataclass
class Tally:
    """What became of the updates of one round."""

    accepted: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    sealed: dict[int, str] = field(default_factory=dict)  # private layers, of whoever sent them


def accepted(
    updates: Iterable[Update], expected: Mapping[str, Tensor], tally: Tally
) -> Iterator[Update]:
    """Passes the good updates on and writes the others down in ``tally``."""
    for update in updates:
        try:
            check_update(update, expected)
        except UpdateError as error:
            tally.refused[update.client] = str(error)
            continue
        tally.accepted.append(update.client)
        yield update


def aggregate(updates: Iterable[Update], *, weighted: bool = True) -> dict[str, Tensor]:
    """Mean of the updates' tensors (FedAvg, McMahan et al. 2017), one update in memory at a time.

    Sums in float64 in the order given (complex128 for complex tensors), so the result depends on
    that order only. Integer tensors (``num_batches_tracked``) are not averaged: the largest wins.

    Args:
        updates: Of one round, all with the same names, shapes and dtypes.
        weighted: Weight by number of examples, else equally.

    Raises:
        FederationError: There are no updates.
    """
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    total = 0
    for update in updates:
        weight = update.examples if weighted else 1
        total += weight
        for name, tensor in update.tensors.items():
            _add(sums, name, tensor, weight)
            dtypes[name] = tensor.dtype
    if not sums:
        raise FederationError(
            "no update to aggregate: every client dropped out or was refused; "
            "lower dropout or the learning rate."
        )
    return {
        name: (value / total).to(dtypes[name]) if _averaged(value) else value
        for name, value in sums.items()
    }


def _add(sums: dict[str, Tensor], name: str, tensor: Tensor, weight: int) -> None:
    if not _averaged(tensor):
        sums[name] = torch.maximum(sums[name], tensor) if name in sums else tensor.clone()
    elif name in sums:
        sums[name].add_(tensor, alpha=weight)
    else:
        # A copy even of float64: the update is the caller's.
        wide = torch.complex128 if tensor.is_complex() else torch.float64
        sums[name] = tensor.to(wide, copy=True).mul_(weight)


def _averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
