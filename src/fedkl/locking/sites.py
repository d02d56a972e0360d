"""Sites: how a module of someone else's model is made to carry a lock.

The module's class is exchanged for a generated subclass, as ``torch.nn.utils.parametrize`` and
FSDP2 do. Identity, hooks, state-dict names and every parent stay as they were, and code that
reads ``norm.weight`` without calling ``norm`` gets γ as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedkl.errors import LockError, SecretError
from fedkl.locking.fused import fused
from fedkl.locking.positions import positioned
from fedkl.locking.sources import PICKLE_REMEDY, AffineSource, copy_of

LOCK_NAME: Final = "keylock"
SITE: Final = "_fedkl_site"
_ORDER: Final = "_fedkl_order"
STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")


class Swapped:
    """Marks a module whose class this package has exchanged."""


class LockedNorm(Swapped):
    """A norm whose γ and β come from its child ``keylock``."""


class PositionalNorm(LockedNorm):
    """A locked norm that runs without affine; γ and β per position are applied to its output.

    A norm over rows does not know their positions: whoever calls it applies γ and β.
    """


class PrivateLayer(Swapped):
    """A layer some of whose tensors are private: as it was, but not to be pickled."""


def guarded(base: type[nn.Module]) -> dict[str, Any]:
    """Members that every exchanged class has: it can be copied but not pickled."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        raise SecretError(PICKLE_REMEDY)

    def copy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        own = getattr(base, "__deepcopy__", None) if isinstance(self, PrivateLayer) else None
        new: nn.Module = copy_of(self, base, memo) if own is None else own(self, memo)
        memo[id(self)] = new
        # Whatever way of its own the layer is copied in: what is private stays marked.
        new.__class__ = type(self)
        for name in self.__dict__.keys() - new.__dict__.keys():
            if name.startswith("_fedkl_"):
                new.__dict__[name] = deepcopy(self.__dict__[name], memo)
        return new

    return {
        "__reduce_ex__": reduce,
        "__deepcopy__": copy,
        "__module__": base.__module__,
        "_fedkl_base": base,
    }


def subclass(name: str, bases: tuple[type, type[nn.Module]], members: dict[str, Any]) -> type:
    """The class that a module of the class ``bases[1]`` is given.

    Raises:
        LockError: That class does not let itself be derived from.
    """
    try:
        return type(name, bases, members)
    except Exception as error:
        raise LockError(
            f"{bases[1].__name__} does not take a lock, nor can it be private, for it does not "
            f"allow a plain subclass ({type(error).__name__}: {str(error)[:200]}): give the "
            "arguments of its __init_subclass__ defaults, or lock another module (layers=…)."
        ) from error


# One generated class per class, so that isinstance and torch.compile see the same one each time.
_LOCKED: Final[dict[type[nn.Module], type[nn.Module]]] = {}
_POSITIONAL: Final[dict[tuple[type[nn.Module], bool], type[nn.Module]]] = {}
_PRIVATE: Final[dict[type[nn.Module], type[nn.Module]]] = {}


def _locked_class(base: type[nn.Module]) -> type[nn.Module]:
    if base in _LOCKED:
        return _LOCKED[base]
    members = guarded(base)
    members["weight"] = property(lambda self: self._modules[LOCK_NAME].scale())
    if issubclass(base, nn.RMSNorm):

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = base.forward(cast(nn.RMSNorm, self), *args, **kwargs)
            return out + source_of(self).shift()

        members["forward"] = forward
    else:
        members["bias"] = property(lambda self: self._modules[LOCK_NAME].shift())
    _LOCKED[base] = subclass(f"Locked{base.__name__}", (LockedNorm, base), members)
    return _LOCKED[base]


def _positional_class(base: type[nn.Module], *, rows: bool) -> type[nn.Module]:
    if (base, rows) in _POSITIONAL:
        return _POSITIONAL[base, rows]
    members = guarded(base)
    channels_first = not issubclass(base, nn.LayerNorm | nn.RMSNorm)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        source = source_of(self)
        if len(args) == 1 and not kwargs:
            at_once = fused(base, self, args[0], source)
            if at_once is not None:
                return at_once
        out: Tensor = base.forward(self, *args, **kwargs)
        return positioned(source, out, channels_first=channels_first)

    # The norm's own forward finds no affine.
    members |= {"weight": None, "bias": None} | ({} if rows else {"forward": forward})
    name = f"Locked{base.__name__}" + "OverRows" * rows
    _POSITIONAL[base, rows] = subclass(name, (PositionalNorm, base), members)
    return _POSITIONAL[base, rows]


def guard(layer: nn.Module) -> None:
    """Makes a layer with private tensors refuse to be pickled (in place)."""
    base = type(layer)
    # What has been exchanged refuses already; scripted modules pickle in a way of their own.
    if issubclass(base, Swapped | torch.jit.ScriptModule):
        return
    if base not in _PRIVATE:
        _PRIVATE[base] = subclass(f"Private{base.__name__}", (PrivateLayer, base), guarded(base))
    layer.__class__ = _PRIVATE[base]


def release(layer: nn.Module) -> None:
    """Inverse of :func:`guard` (in place)."""
    if isinstance(layer, PrivateLayer):
        layer.__class__ = type(layer)._fedkl_base  # type: ignore[attr-defined]


def check_free(module: nn.Module, child: str) -> None:
    """Raises if ``module`` has something of the name under which a lock would be its child.

    Raises:
        LockError: It has.
    """
    if hasattr(module, child):
        raise LockError(
            f"a {type(module).__name__} has something called {child} already, which is the name of "
            "what a lock puts there; rename it, or lock another module (layers=…, behind=…)."
        )


def affine_shape(norm: nn.Module) -> tuple[int, ...]:
    """Shape of γ: (C,) for batch, group and instance norm, ``normalized_shape`` otherwise."""
    if isinstance(norm, _BatchNorm | _InstanceNorm):
        return (norm.num_features,)
    if isinstance(norm, nn.GroupNorm):
        return (norm.num_channels,)
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        return tuple(norm.normalized_shape)
    raise LockError(f"{type(norm).__name__} is not a norm that can carry a lock.")


def current_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The norm's γ and β, ones and zeros where it has none. On its device, in its dtype."""
    shape = affine_shape(norm)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    tensors = [
        t for t in (weight, bias, *norm.buffers()) if t is not None and t.is_floating_point()
    ]
    like = tensors[0] if tensors else torch.empty(())
    scale = torch.ones(shape, device=like.device, dtype=like.dtype) if weight is None else weight
    shift = torch.zeros(shape, device=like.device, dtype=like.dtype) if bias is None else bias
    return scale.detach(), shift.detach()


def source_of(norm: nn.Module) -> AffineSource:
    """The affine source of a locked norm."""
    return cast(AffineSource, norm.get_submodule(LOCK_NAME))


def locked_norms(model: nn.Module, *, aliases: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every locked norm; ``aliases``: under all its names."""
    for name, module in model.named_modules(remove_duplicate=not aliases):
        if isinstance(module, LockedNorm):
            yield name, cast(nn.Module, module)


def lock_norm(
    norm: nn.Module,
    source: AffineSource,
    site: str,
    *,
    statistics_shared: bool,
    positional: bool = False,
    rows: bool = False,
) -> None:
    """Makes ``norm`` take γ and β from ``source``, per position or per channel (in place).

    ``rows``: it was inserted and runs over the last axis (:func:`insertion.apply_last`).

    A norm whose γ or β is frozen gets a lock that is: the start says what it is, training nothing.

    Raises:
        LockError: The norm has something else called ``keylock``, or is of a class that does not
            let itself be derived from.
    """
    check_free(norm, LOCK_NAME)
    kind = type(norm)
    swapped = _positional_class(kind, rows=rows) if positional else _locked_class(kind)
    norm.__dict__[_ORDER] = tuple(norm._parameters)
    original = {name: norm._parameters.pop(name, None) for name in ("weight", "bias")}
    scale, shift = ((p is not None and not p.requires_grad) for p in original.values())
    source.freeze(scale=scale, shift=shift)
    norm.__dict__[SITE] = site
    norm.__dict__["_fedkl_original"] = original
    norm.__dict__["_fedkl_statistics_shared"] = statistics_shared
    norm.__dict__["_fedkl_statistics"] = {
        name: buffer.detach().clone()
        for name in STATISTICS
        if not statistics_shared and (buffer := norm._buffers.get(name)) is not None
    }
    norm.__class__ = swapped
    norm.add_module(LOCK_NAME, source)
    if positional:
        # Fused inference paths (nn.TransformerEncoderLayer), which skip norms, respect a hook.
        norm.__dict__["_fedkl_hook"] = norm.register_forward_pre_hook(_nothing)


def _nothing(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that is there to be seen."""


def restore_statistics(norm: nn.Module) -> None:
    """Puts private running statistics of a locked norm back to those before locking (in place)."""
    with torch.no_grad():
        for name, before in norm.__dict__["_fedkl_statistics"].items():
            buffer = norm._buffers[name]
            assert buffer is not None
            buffer.copy_(before)


def unlock_norm(norm: nn.Module, *, keep_statistics: bool = False) -> None:
    """Gives ``norm`` its own class and the affine it had before locking (in place).

    Private running statistics are functions of private features: they go with the lock, unless
    ``keep_statistics``.
    """
    if not keep_statistics:
        restore_statistics(norm)
    like = source_of(norm).like()
    del norm._modules[LOCK_NAME]
    original = norm.__dict__.pop("_fedkl_original")
    for name in ("_fedkl_statistics_shared", "_fedkl_statistics", SITE):
        del norm.__dict__[name]
    if hook := norm.__dict__.pop("_fedkl_hook", None):
        hook.remove()
    norm.__class__ = type(norm)._fedkl_base  # type: ignore[attr-defined]
    for name, parameter in original.items():
        if name == "bias" and isinstance(norm, nn.RMSNorm):
            continue
        if parameter is not None:
            parameter.data = parameter.data.to(like.device, like.dtype)
        norm.register_parameter(name, parameter)
    # Optimizers and vectors of parameters go by the order.
    for name in norm.__dict__.pop(_ORDER):
        norm._parameters[name] = norm._parameters.pop(name)
