"""Norms put where there is none: behind a module, or in front of one."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

from fedkl.errors import ConfigError, LockError, unknown
from fedkl.locking.positions import positioned
from fedkl.locking.sites import PositionalNorm, Swapped, check_free, guarded, source_of, subclass

INSERTED_NAME: Final = "inserted_norm"
INPUT_NAME: Final = "input_norm"
_ROWS: Final = "_fedkl_rows_"

CONVOLUTIONS: Final[dict[type[nn.Module], int]] = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}
_BATCH: Final = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE: Final = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
INSERTABLE: Final = ("batch", "group", "instance")


class NormAfter(Swapped):
    """A module with a norm inserted behind it."""


class NormBefore(Swapped):
    """A convolution or linear layer with a norm inserted in front of it."""


@dataclass(frozen=True)
class Room:
    """What a norm is to be inserted for.

    Attributes:
        features: Number of features it scales.
        dims: Axes of positions behind (batch, features); 1 where there are none or ``rows``.
        rows: Whether the features are the last axis, and all before it rows of a batch.
    """

    features: int
    dims: int
    rows: bool


# One generated class per class, so that isinstance and torch.compile see the same one each time.
_NORMED: Final[dict[type[nn.Module], type[nn.Module]]] = {}
_FRONTED: Final[dict[type[nn.Module], type[nn.Module]]] = {}


def _normed_class(base: type[nn.Module]) -> type[nn.Module]:
    if base in _NORMED:
        return _NORMED[base]
    members = guarded(base)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = base.forward(self, *args, **kwargs)
        return _applied(self, INSERTED_NAME, out)

    # A sequence goes over all its children, and the norm is to run last, in a way of its own.
    members |= _members_of_sequences(base) if is_sequence(base) else {"forward": forward}
    _NORMED[base] = subclass(f"Normed{base.__name__}", (NormAfter, base), members)
    return _NORMED[base]


def _members_of_sequences(base: Any) -> dict[str, Any]:
    def forward(self: nn.Module, input: Any) -> Tensor:
        for name, child in self._modules.items():
            if name != INSERTED_NAME and child is not None:
                input = child(input)
        return _applied(self, INSERTED_NAME, input)

    def getitem(self: nn.Module, index: Any) -> Any:
        if not isinstance(index, slice):
            return base.__getitem__(self, index)
        part = base(OrderedDict(list(self._modules.items())[index]))
        if INSERTED_NAME in part._modules:
            part.__class__ = type(self)
            part.__dict__[_ROWS + INSERTED_NAME] = runs_over_rows(self)
        return part

    return {"forward": forward, "__getitem__": getitem}


def is_sequence(kind: type[nn.Module]) -> bool:
    """Whether modules of this class run their children one after the other and do nothing else."""
    return kind.forward is nn.Sequential.forward


def _fronted_class(base: type[nn.Module]) -> type[nn.Module]:
    if base in _FRONTED:
        return _FRONTED[base]
    members = guarded(base)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            args = (_applied(self, INPUT_NAME, args[0]), *args[1:])
        else:
            name = "input" if "input" in kwargs else next(iter(kwargs))
            kwargs[name] = _applied(self, INPUT_NAME, kwargs[name])
        out: Tensor = base.forward(self, *args, **kwargs)
        return out

    members["forward"] = forward
    _FRONTED[base] = subclass(f"Fronted{base.__name__}", (NormBefore, base), members)
    return _FRONTED[base]


def _applied(module: nn.Module, child: str, x: Tensor) -> Tensor:
    norm = module._modules[child]
    assert norm is not None
    if runs_over_rows(module, child):
        return apply_last(norm, x)
    out: Tensor = norm(x)
    return out


def runs_over_rows(module: nn.Module, child: str = INSERTED_NAME) -> bool:
    """Whether the norm inserted as ``child`` of ``module`` runs over the last axis."""
    return bool(module.__dict__[_ROWS + child])


def apply_last(norm: nn.Module, x: Tensor) -> Tensor:
    """Applies a norm over (N, C) to the last axis of ``x`` (..., C)."""
    out: Tensor = norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)
    # The positions are those of x, not of the rows that the norm averages over.
    return positioned(source_of(norm), out) if isinstance(norm, PositionalNorm) else out


def insert_norm(
    module: nn.Module, norm: nn.Module, *, rows: bool = False, before: bool = False
) -> None:
    """Puts ``norm`` behind ``module``, or in front of it, over ``rows`` or not (in place).

    Raises:
        LockError: The module has something else of the norm's name.
    """
    swapped, child = (_fronted_class, INPUT_NAME) if before else (_normed_class, INSERTED_NAME)
    check_free(module, child)
    module.__class__ = swapped(type(module))
    module.__dict__[_ROWS + child] = rows
    module.add_module(child, norm)


def remove_norm(module: nn.Module) -> nn.Module:
    """Takes an inserted norm away again and returns it (in place)."""
    child = INPUT_NAME if isinstance(module, NormBefore) else INSERTED_NAME
    norm = module._modules.pop(child)
    assert norm is not None
    module.__class__ = type(module)._fedkl_base  # type: ignore[attr-defined]
    del module.__dict__[_ROWS + child]
    return norm


def room_at(layer: nn.Module, *, before: bool = False) -> Room:
    """What a norm behind a convolution or linear layer is for, or in front of one."""
    linear = isinstance(layer, nn.Linear)
    width = ("in" if before else "out") + ("_features" if linear else "_channels")
    features = getattr(layer, width)
    assert isinstance(features, int)
    dims = 1 if linear else next(d for c, d in CONVOLUTIONS.items() if isinstance(layer, c))
    return Room(features, dims, linear)


def new_norm(room: Room, kind: str, like: Tensor, *, training: bool = True) -> nn.Module:
    """An ordinary norm with affine that fits ``room``, of the device and dtype of ``like``.

    Raises:
        ConfigError: ``kind`` is not one of :data:`INSERTABLE`.
        LockError: The norm has nothing to average over there.
    """
    if kind not in INSERTABLE:
        raise ConfigError(unknown("norm to insert", kind, INSERTABLE))
    norm: nn.Module
    if kind == "batch":
        norm = _BATCH[room.dims](room.features)
    elif kind == "group":
        # Without positions a group of one feature would be normalized to zero.
        norm = nn.GroupNorm(1 if room.rows else math.gcd(room.features, 32), room.features)
    elif room.rows:
        raise LockError(
            "an instance norm behind a linear layer or over tokens would average over nothing; "
            "pass norm='batch' or norm='group'."
        )
    else:
        norm = _INSTANCE[room.dims](room.features, affine=True)
    return norm.to(like.device, like.dtype).train(training)
