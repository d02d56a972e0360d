"""Finding the lock in a model, whatever the model has been wrapped into since."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fedkl.errors import LockError
from fedkl.locking.sites import locked_norms, source_of
from fedkl.locking.sources import AffineSource
from fedkl.locking.spec import LockSpec


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and ``torch.compile`` wrappers.

    Raises:
        LockError: ``model`` is not a module.
    """
    while True:
        if not isinstance(model, nn.Module):
            raise LockError(
                f"expected a torch.nn.Module, got {type(model).__name__}; pass the model "
                "itself, not its state or its name."
            )
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def copied(model: nn.Module, then: str) -> nn.Module:
    """A deep copy.

    Raises:
        LockError: torch cannot make one; ``then`` says what the caller can do about it.
    """
    try:
        return deepcopy(model)
    except Exception as error:
        raise LockError(
            f"the model cannot be copied ({type(error).__name__}: {str(error)[:200]}): remove what "
            f"torch cannot copy (the old weight_norm, cached activations). {then}."
        ) from error


def holders(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that were locked: the model itself, or what it was made of afterwards."""
    for module in unwrap(model).modules():
        if isinstance(module.__dict__.get("_fedkl_spec"), LockSpec):
            yield module


def lock_spec(model: nn.Module) -> LockSpec:
    """What the public may know of the model's lock.

    Raises:
        LockError: The model is not locked.
    """
    for module in holders(model):
        spec: LockSpec = module.__dict__["_fedkl_spec"]
        return spec
    raise LockError("the model is not locked; lock(model, key) first.")


def is_locked(model: nn.Module) -> bool:
    """Whether any scheme, ``norm`` included, was applied to ``model``.

    Raises:
        LockError: ``model`` is not a module.
    """
    return any(True for _ in holders(model))


def sources_of(model: nn.Module) -> dict[str, AffineSource]:
    """The affine source of every lock by site name.

    Raises:
        LockError: ``model`` is not a module.
    """
    return {name: source_of(norm) for name, norm in locked_norms(unwrap(model))}
