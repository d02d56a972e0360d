"""What only a run on the example shows: activation sizes, and what lies before the first lock."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedkl.errors import LockError
from fedkl.locking.check import restored
from fedkl.locking.survey import call, is_norm, kind_of
from fedkl.rng import borrowed, derive

Size = tuple[int, ...]


def activation_sizes(
    model: nn.Module, example: Any, names: Collection[str], *, inputs: bool = False
) -> dict[str, Size]:
    """Size per example of what each named module puts out (or takes in), without the batch axis.

    Runs in eval mode, and in train mode if a module (an auxiliary head) has not run there.

    Raises:
        LockError: A module runs at two sizes, or not at all.
    """
    found: dict[str, set[Size]] = {name: set() for name in names}

    def hook(name: str) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            value = args[0] if inputs and args else output
            if isinstance(value, Tensor):
                found[name].add(tuple(value.shape[1:]))

        return record

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    try:
        for mode in (False, True):
            if not all(found.values()):
                with restored(model):
                    _run(model, example, train=mode)
    finally:
        for handle in handles:
            handle.remove()
    if silent := [name for name, sizes in found.items() if not sizes]:
        raise LockError(
            f"{', '.join(silent)} does not run on this example, so the size of its lock is "
            "unknown; pass a richer example, or leave it out with layers=…"
        )
    if several := {n: sorted(s) for n, s in found.items() if len(s) > 1}:
        raise LockError(
            f"these modules run at two sizes, and a lock per position has one: {several}. Leave "
            "them out with layers=…, give each call a norm of its own, or use scheme='channel'."
        )
    return {name: sizes.pop() for name, sizes in found.items()}


def _run(model: nn.Module, example: Any, *, train: bool) -> None:
    with torch.enable_grad(), borrowed(derive(0, "sizes")):
        model.train(train)
        try:
            call(model, example)
        except Exception as error:
            raise LockError(
                f"the model does not run on the example: {type(error).__name__}: {error}. "
                "Pass the tensor, tuple of arguments or dict of keyword arguments it takes, of "
                "at least two inputs."
            ) from error


def head_of(order: Sequence[str], model: nn.Module) -> str:
    """The classifier: the last linear layer that runs, or else the last convolution.

    Raises:
        LockError: There is neither.
    """
    for kind in ("linear", "convolution"):
        for name in reversed(order):
            if kind_of(model.get_submodule(name)) == kind:
                return name
    raise LockError("the model has no linear layer or convolution that could be its head.")


def stem_of(model: nn.Module, example: Any, first: str, order: Sequence[str]) -> list[str]:
    """Names of the tensors that the output of ``first`` depends on: the stem, that module's too.

    Parameters by the gradient of that output, buffers of every norm that runs before and of every
    module one of whose parameters is in the stem. Tied parameters under all their names.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    outputs: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.extend(t for t in tree_leaves(output) if isinstance(t, Tensor))

    handle = model.get_submodule(first).register_forward_hook(record)
    try:
        # Backward before the buffers are put back, which would spoil it.
        with restored(model), _all_with_gradient(parameters):
            _run(model, example, train=False)
            total = sum((t.float().square().sum() for t in outputs), torch.zeros(()))
            used = (
                torch.autograd.grad(total, parameters, allow_unused=True)
                if total.requires_grad
                else [None] * len(parameters)
            )
    finally:
        handle.remove()
    stem = {id(p) for p, grad in zip(parameters, used, strict=True) if grad is not None}
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in stem]
    before = set(order[: order.index(first)]) if first in order else set()
    locked = model.get_submodule(first)
    for name, module in model.named_modules(remove_duplicate=False):
        owns = any(id(p) in stem for p in module.parameters(recurse=False))
        if module is not locked and (owns or (name in before and is_norm(module))):
            dot = f"{name}." if name else ""
            names += [f"{dot}{n}" for n in module._buffers if module._buffers[n] is not None]
    return names


@contextmanager
def _all_with_gradient(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
