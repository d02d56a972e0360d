"""merge: a locked model as an ordinary private one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedkl.errors import LockError
from fedkl.locking.check import restored
from fedkl.locking.holder import copied, is_locked, lock_spec, unwrap
from fedkl.locking.insertion import (
    NormAfter,
    apply_last,
    is_sequence,
    remove_norm,
    runs_over_rows,
)
from fedkl.locking.sites import LockedNorm, source_of, unlock_norm
from fedkl.locking.split import forget
from fedkl.locking.survey import call, does_not_run
from fedkl.rng import borrowed, derive


class Shift(nn.Module):
    """Adds a learned β; stands behind an RMS norm, which has none."""

    def __init__(self, beta: Tensor) -> None:
        super().__init__()
        self.beta = nn.Parameter(beta)

    def forward(self, x: Tensor) -> Tensor:
        """x + β over the last axes of ``x``."""
        return x + self.beta


class LastAxis(nn.Module):
    """Applies a norm over (N, C) to the last axis of (..., C)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        return apply_last(self.norm, x)


class Followed(nn.Sequential):
    """A module and the norm behind it: takes what the module takes, and shows what it has."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the norm makes of the module's output."""
        return self[1](self[0](*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "1" not in modules or name.startswith("__"):
                raise  # still being put together, or asked how to be copied
            return getattr(modules["0"], name)


def merge(model: nn.Module, *, example: Any = None) -> nn.Module:
    """An ordinary model with γ and β baked into its norms: computes the same, carries no key.

    The result is private (γ and β are in it), can be pickled, and runs without FedKL's lock. A
    layer with an inserted norm becomes an ``nn.Sequential`` of both, wherever the model refers to
    it, so those names change; it takes what the layer takes and shows the layer's attributes.
    Behind a sequence the norm becomes the last of its children.

    Args:
        model: What :func:`fedkl.lock` returned. Stays as it is.
        example: As of :func:`fedkl.lock`. With it both models run on it in eval mode, and have to
            put out the same.

    Raises:
        LockError: The model is not locked, or cannot be copied, or its lock has one γ and β per
            position (``pad``), which no ordinary norm can hold. Or the result differs on the
            example: the model looks at the class of a layer, say.
    """
    spec = lock_spec(model)
    if spec.scheme_value().positional:
        raise LockError(
            f"a lock of scheme {spec.scheme!r} has one scale per position, which no ordinary norm "
            "can hold; use the locked model itself, or keep its state_dict and the key."
        )
    root = copied(unwrap(model), "Then merge it")
    for module in list(root.modules()):
        if isinstance(module, LockedNorm):
            _bake(module)
    root = _exchanged(root)
    for module in root.modules():
        module.__dict__.pop("_fedkl_spec", None)
        forget(module)
    assert not is_locked(root)
    if example is not None:
        _compare(unwrap(model), root, example)
    return root


def _compare(locked: nn.Module, merged: nn.Module, example: Any) -> None:
    outputs = []
    for model in (locked, merged):
        with restored(model), torch.no_grad(), borrowed(derive(0, "merge")):
            try:
                output = call(model.eval(), example)
            except Exception as error:
                raise does_not_run(model, example, error) from error
            outputs.append([t for t in tree_leaves(output) if isinstance(t, Tensor)])
    # Sums in another order: γ is rounded once, not at every call.
    if len(outputs[0]) != len(outputs[1]) or not all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(*outputs, strict=True)
    ):
        raise LockError(
            "the merged model computes something else on this example: it looks at the class of a "
            "layer behind which a norm was inserted, or reads its weights past it. Use the locked "
            "model itself."
        )


def _bake(norm: nn.Module) -> None:
    with torch.no_grad():
        source = source_of(norm)
        scale, shift = source.scale().clone(), source.shift().clone()
    unlock_norm(norm, keep_statistics=True)
    norm.weight = nn.Parameter(scale)
    if isinstance(norm, nn.RMSNorm):
        norm.__dict__["_fedkl_shift"] = shift
    else:
        norm.bias = nn.Parameter(shift)
    for flag in ("affine", "elementwise_affine"):
        if hasattr(norm, flag):
            setattr(norm, flag, True)


def _exchanged(root: nn.Module) -> nn.Module:
    """A copy with sequences in the place of normed layers and shifted RMS norms (uses up ``root``).

    Python's own copying then puts each wherever the old one was, in lists and dicts of the model's
    as well.
    """
    memo: dict[int, Any] = {}
    for module in _inside_first(root, set()):
        norm: nn.Module | None = None
        if isinstance(module, NormAfter):
            norm = _norm_behind(module)
        elif "_fedkl_shift" in module.__dict__:
            norm = Shift(module.__dict__.pop("_fedkl_shift"))
        if norm is not None:
            if id(module) in memo:
                raise LockError(
                    f"another layer refers to this {type(module).__name__} without having it for "
                    "a child, and would go past its norm; use the locked model itself."
                )
            norm.training = module.training
            made = Followed(deepcopy(module, memo), deepcopy(norm, memo))
            made.training = module.training
            memo[id(module)] = made
    return deepcopy(root, memo)


def _inside_first(module: nn.Module, seen: set[nn.Module]) -> Iterator[nn.Module]:
    """All modules, each behind those that are in it."""
    if module not in seen:
        seen.add(module)
        for child in list(module.children()):
            yield from _inside_first(child, seen)
        yield module


def _norm_behind(module: nn.Module) -> nn.Module | None:
    """Takes the inserted norm off; of a sequence it becomes a child, and there is none left."""
    rows, norm = runs_over_rows(module), remove_norm(module)
    norm = LastAxis(norm) if rows else norm
    if is_sequence(type(module)):
        norm.training = module.training
        free = (str(i) for i in itertools.count(len(module._modules)))
        module.add_module(next(name for name in free if name not in module._modules), norm)
        return None
    return norm
