"""Whether the batch is the first axis where locks stand, as a lock per position takes it to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from fedkl.errors import LockError
from fedkl.locking.check import nothing_zero, restored
from fedkl.locking.passing import apart
from fedkl.locking.sizes import Size, activation_sizes, run


def check_batch_axis(model: nn.Module, example: Any, sizes: Mapping[str, Size]) -> None:
    """Raises unless axis 0 is the batch where the locks stand, as far as runs tell.

    Models of tokens may keep them in axis 0 and the batch behind (``batch_first=False``). A pad
    would then have one γ and β per example of the batch, and all tokens would share them. It is so
    where locks do not fit twice the batch, where outputs have the example's second axis for their
    first, and where in eval mode entries of axis 0 hear of each other and those of axis 1 do not,
    as examples of a batch: if those of axis 1 do as well, the model may mix examples on purpose.

    Args:
        model: Not yet locked.
        example: As of :func:`fedkl.lock`.
        sizes: Size per example by module's name, as :func:`activation_sizes` gives it.

    Raises:
        LockError: It is not.
    """
    if not _length(example, 0):
        return
    if _turned(model, example, sizes) or (
        _apart_along(model, example, [*sizes], 0) is False
        and _apart_along(model, example, [*sizes], 1)
    ):
        raise LockError(
            "the batch is not the first axis where the locks stand (tokens come first, as with "
            "batch_first=False), so that a pad would hang on examples instead of positions; build "
            "the model with batch_first=True, or use scheme='channel'."
        )


def _length(example: Any, axis: int) -> int:
    """How long the axis is of the first tensor that has it; 0 if none does."""
    lengths = [t.shape[axis] for t in tree_leaves(example) if _has(t, axis)]
    return int(lengths[0]) if lengths else 0


def _has(value: Any, axis: int, length: int | None = None) -> bool:
    long = isinstance(value, Tensor) and value.ndim > axis
    return long and length in (None, value.shape[axis])


def _doubled(example: Any, axis: int) -> Any:
    length = _length(example, axis)
    return tree_map(
        lambda v: torch.cat([v, v], axis) if _has(v, axis, length) else v,
        example,
    )


def _turned(model: nn.Module, example: Any, sizes: Mapping[str, Size]) -> bool:
    """The same by sizes: of twice the batch, and of the outputs."""
    try:
        after = activation_sizes(model, _doubled(example, 0), list(sizes))
    except LockError:
        return False  # not made of a batch that could be doubled
    with restored(model):
        ends = {len(t) for t in run(model, example, train=False) if t.ndim}
    return after != sizes or any(
        t.ndim in (2, 3) and {t.shape[1]} == ends != {t.shape[0]}
        for t in tree_leaves(example)
        if isinstance(t, Tensor)
    )


def _apart_along(model: nn.Module, example: Any, names: Sequence[str], axis: int) -> bool | None:
    """Whether entries along an axis are worked on apart from each other; None if nothing tells.

    The first entry is another one, or the last, where a model looks back alone: the others have to
    stay as they are, in the outputs and in what the modules ``names`` put out.
    """
    if (length := _length(example, axis)) == 1:
        example, length = _doubled(example, axis), 2
    told = None
    try:
        with nothing_zero(model):
            before = _made(model, example, names)
            for first in (True, False):
                other = tree_map(lambda v, f=first: _changed(v, axis, length, f), example)
                pairs = [
                    [t.narrow(axis, int(first), length - 1) for t in pair]
                    for pair in zip(before, _made(model, other, names), strict=True)
                    if all(_has(t, axis, length) for t in pair)
                ]
                if any(apart([one], [changed]) for one, changed in pairs):
                    return False
                told = True if pairs else told
    except (LockError, ValueError):
        return None  # it does not run on that, or does something else
    return told


def _made(model: nn.Module, example: Any, names: Sequence[str]) -> list[Tensor]:
    """What modules, and the model, put out in eval mode with norms over the batch left aside."""
    made: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = (t for t in tree_leaves(output) if isinstance(t, Tensor))
        made.extend(t.detach().clone() for t in found if t.is_floating_point())

    def aside(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return args[0] if args else output

    over = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    handles = [norm.register_forward_hook(aside) for norm in over]
    handles += [model.get_submodule(name).register_forward_hook(keep) for name in names]
    try:
        with restored(model):
            outputs = run(model, example, train=False)
            return [*made, *(t.detach() for t in outputs if t.is_floating_point())]
    finally:
        for handle in handles:
            handle.remove()


def _changed(value: Any, axis: int, length: int, first: bool) -> Any:
    """With other numbers as the first entry along the axis or the last; masks as they are."""
    if not _has(value, axis, length) or value.is_complex() or value.dtype == torch.bool:
        return value
    entry, neighbor = (0, 1) if first else (-1, -2)
    part = value.select(axis, entry)
    if value.is_floating_point():
        # Norms of the input do not hear of a scale, nor means of an order.
        other = 0.5 * part.flatten().roll(1).view(part.shape) + 0.1
    else:
        other = value.select(axis, neighbor)
        other = (part == 0).to(part.dtype) if torch.equal(other, part) else other
    new = value.clone()
    new.select(axis, entry).copy_(other)
    return new
