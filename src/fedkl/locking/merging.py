"""merge: a locked model as an ordinary private one."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fedkl.errors import LockError
from fedkl.locking.behind import is_layer
from fedkl.locking.holder import is_locked, lock_spec, unwrap
from fedkl.locking.insertion import (
    INSERTED_NAME,
    NormAfter,
    apply_last,
    is_sequence,
    remove_norm,
    runs_over_rows,
)
from fedkl.locking.sites import LockedNorm, source_of, unlock_norm
from fedkl.locking.split import forget


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
            module = self.__dict__.get("_modules", {}).get("0")
            if module is None:
                raise
            return getattr(module, name)


def merge(model: nn.Module) -> nn.Module:
    """An ordinary model with γ and β baked into its norms: computes the same, carries no key.

    The result is private (γ and β are in it), can be pickled, and runs without FedKL's lock. An
    inserted norm becomes ``nn.Sequential(layer, norm)``, so those names change; behind a sequence
    it becomes the last of its children.

    Raises:
        LockError: The model is not locked, or its lock has one γ and β per position (``pad``),
            which no ordinary norm can hold.
    """
    spec = lock_spec(model)
    if spec.scheme_value().positional:
        raise LockError(
            f"a lock of scheme {spec.scheme!r} has one scale per position, which no ordinary norm "
            "can hold; use the locked model itself, or keep its state_dict and the key."
        )
    root = deepcopy(unwrap(model))
    for module in list(root.modules()):
        if isinstance(module, LockedNorm):
            _bake(module)
    root = _replace(root, {})
    for module in root.modules():
        module.__dict__.pop("_fedkl_spec", None)
        forget(module)
    assert not is_locked(root)
    return root


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


def _replace(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """Exchanges normed layers and shifted RMS norms for sequences, everywhere they are used."""
    if id(module) in done:
        return done[id(module)]
    done[id(module)] = module
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _replace(child, done)
    result = module
    if isinstance(module, NormAfter):
        result = _with_norm(module)
    elif "_fedkl_shift" in module.__dict__:
        result = nn.Sequential(module, Shift(module.__dict__.pop("_fedkl_shift")))
    result.training = module.training
    done[id(module)] = result
    return result


def _with_norm(module: nn.Module) -> nn.Module:
    """A normed module as an ordinary one."""
    rows, norm = runs_over_rows(module), remove_norm(module)
    norm = LastAxis(norm) if rows else norm
    norm.training = module.training
    if is_sequence(type(module)):
        module.add_module(INSERTED_NAME, norm)
        return module
    return (nn.Sequential if is_layer(module) else Followed)(module, norm)
