"""Running statistics of a client's norms anew, from inputs of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedkl.errors import DataError
from fedkl.locking.holder import lock_spec, unwrap
from fedkl.locking.split import split
from fedkl.locking.survey import call


def calibrate(model: nn.Module, batches: Iterable[Any], *, every_norm: bool = False) -> None:
    """Running statistics of the locked norms anew, from unlabelled inputs (in place).

    Private statistics belong to the weights a client trained itself; those that come back from the
    server are an average, under which the old statistics are off. A client calibrates before it
    uses a global model (training needs it not: a batch norm then takes the batch's statistics).

    Args:
        model: A locked model; nothing happens if it has no private statistics.
        batches: Inputs of the model; every batch counts the same. A few hundred examples do. Of a
            data loader's (inputs, labels) the inputs are taken, so for a model of several inputs a
            batch is a dict of its arguments by name.
        every_norm: Re-estimate shared norms as well.

    Raises:
        LockError: The model is not locked.
        DataError: There is no batch, one holds NaN or infinity or is not what the model takes, or
            the statistics come out so. They then stay as they were, as they do when the model
            fails on a batch.
        StateError: As :func:`fedkl.shared_state`.
    """
    lock_spec(model)
    estimate_statistics(model, batches, every_norm=every_norm, finite=True)


def estimate_statistics(
    model: nn.Module, batches: Iterable[Any], *, every_norm: bool = False, finite: bool = False
) -> None:
    """As :func:`calibrate`, of a model without a lock too; ``finite`` says what of the outcome.

    Raises:
        DataError, StateError: As :func:`calibrate`.
    """
    root = unwrap(model)
    private = {id(t) for t in split(model).private.values()}
    norms = [
        norm
        for norm in root.modules()
        if isinstance(norm, _BatchNorm | _InstanceNorm) and norm.track_running_stats
        if every_norm or id(norm.running_mean) in private
    ]
    given = _iterator(batches)
    if not norms:
        return
    with _gathering(root, norms), torch.no_grad():
        count = 0
        for batch in given:
            _show(root, batch)
            count += 1
        if count == 0:
            raise DataError(
                "no batch to calibrate on; pass one or more (an iterator gives its batches once)."
            )
        if finite and not all(bool(torch.isfinite(b).all()) for n in norms for b in n.buffers()):
            raise DataError(
                "statistics on these batches are NaN or infinite; they stay as they were. The "
                "model's weights or the inputs have values out of all proportion: look at them."
            )


def _show(root: nn.Module, batch: Any) -> None:
    inputs = _inputs(batch)
    try:
        call(root, inputs)
    except TypeError as error:
        got = f"the first part of a {type(batch).__name__}" if inputs is not batch else "it"
        raise DataError(
            f"the model does not take a batch to calibrate on ({error}); it was given {got}. Pass "
            "a tensor, (inputs, labels), or for a model of several inputs a dict by argument name."
        ) from error


def _iterator(batches: Iterable[Any]) -> Iterator[Any]:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise DataError(
            f"expected batches to calibrate on, got {type(batches).__name__}; pass a list of them "
            "([x] for one) or a data loader."
        )
    return iter(batches)


def _inputs(batch: Any) -> Any:
    """The model's inputs in one batch, all of them finite."""
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    tensors = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    if not all(isinstance(t, Tensor) for t in tensors):
        raise DataError(
            f"expected a batch to be a tensor, a dict of them, or (inputs, labels), got "
            f"{type(batch).__name__} of {type(inputs).__name__}."
        )
    if any(not bool(torch.isfinite(t).all()) for t in tensors):
        raise DataError(
            "a batch to calibrate on holds NaN or infinity; the statistics stay as they were. "
            "Leave such inputs out."
        )
    return inputs


class _Cumulative:
    """Makes running statistics a mean over the batches; instance norms have no mode for that."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        self.seen += 1
        norm.momentum = 1 / self.seen  # type: ignore[assignment]


@contextmanager
def _gathering(root: nn.Module, norms: Sequence[_BatchNorm | _InstanceNorm]) -> Iterator[None]:
    """Within the block ``norms`` alone are in train mode and take cumulative statistics anew."""
    modes = {module: module.training for module in root.modules()}
    momenta = [norm.momentum for norm in norms]
    kept = [(b, b.detach().clone()) for norm in norms for b in norm.buffers(recurse=False)]
    root.eval()
    handles = [norm.register_forward_pre_hook(_Cumulative()) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        yield
    except BaseException:
        for buffer, before in kept:
            buffer.copy_(before)
        raise
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
