"""Which tensors of a model may leave the client: told by the tensors, not by their names.

Wrappers and parametrizations rename what is in a state dict. Modules that own something private
therefore carry a mark, and the split looks for the very tensors they hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fedkl.errors import StateError
from fedkl.locking.holder import holders, lock_spec, unwrap
from fedkl.locking.sites import LOCK_NAME, SITE, LockedNorm, source_of
from fedkl.locking.stem import owned

RECORD: Final = "_fedkl_record"
_KNOWN: Final = "_fedkl_known"
# Where a state dict has what get_extra_state() of a module returned.
_EXTRA: Final = "_extra_state"
# What torch.compile, activation checkpointing and FSDP put into names.
_WRAPPERS: Final = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_REMEDY: Final = (
    "Nothing is sent from it: undo the change (remove weight norms, pruning or replaced layers), "
    "make it before lock(), or pass the whole model that lock() returned."
)


@dataclass(frozen=True)
class Split:
    """The state dict in two parts, under the original names; the model's own tensors.

    Attributes:
        shared: What may leave the client.
        private: What never does.
        left_out: Names of what is in neither: extra state (``get_extra_state``), and what hooks
            put into the state dict that is no module's own parameter or buffer. Nobody knows
            whether that is public, and it cannot be copied in place.
    """

    shared: dict[str, Tensor] = field(default_factory=dict)
    private: dict[str, Tensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def record(model: nn.Module) -> None:
    """Writes down, on a freshly locked model, what :func:`split` has to find (in place)."""
    model.__dict__[RECORD] = frozenset(_found(model, {}, set()))
    for module in model.modules():
        module.__dict__[_KNOWN] = frozenset(_own(module))


def forget(module: nn.Module) -> None:
    """Inverse of :func:`record` for one module (in place)."""
    module.__dict__.pop(RECORD, None)
    module.__dict__.pop(_KNOWN, None)


def split(model: nn.Module) -> Split:
    """Shared and private tensors of a model; all are shared where there is no lock.

    What a module keeps as extra state, or a hook adds to the state dict, is in neither part.

    Raises:
        StateError: The model was changed since ``lock()`` so that something private is not there
            any more as it was, or that there are tensors in, around or beside its layers of which
            nobody knows what they see; or it is a part of a locked model only.
        LockError: ``model`` is not a module.
    """
    root = unwrap(model)
    private: dict[int, Tensor] = {}
    covered: set[int] = set()
    for holder in holders(root):
        found = _found(holder, private, covered)
        if lost := sorted(holder.__dict__[RECORD] - found):
            raise StateError(
                f"the model was changed since lock(): {', '.join(lost[:4])}, which is private, is "
                f"not where the lock left it. {_REMEDY}"
            )
    for holder in holders(root):
        hides = bool(lock_spec(holder).private)
        if hides and (new := list(_strangers(holder, private, ""))):
            raise StateError(
                f"the model was changed since lock(): {', '.join(new[:4])} came in, a new layer or "
                "an adapter of a private one, and its gradient may give the input away. Adapters "
                f"of shared layers may stay. {_REMEDY}"
            )
    if any(id(module) not in covered and _guards(module) for module in root.modules()):
        raise StateError(
            "these are parts of a locked model without the model that lock() returned, so what of "
            f"them is private is not known for certain. {_REMEDY}"
        )
    state = root.state_dict(keep_vars=True)
    parts = Split()
    own = {id(tensor) for module in root.modules() for tensor in _own(module).values()}
    for name, tensor in zip(_original_names(root, state), state.values(), strict=True):
        if name.rpartition(".")[2] == _EXTRA or id(tensor) not in own:
            parts.left_out.append(name)
            continue
        part = parts.private if id(tensor) in private else parts.shared
        part[name] = tensor
    _check(parts, state, private)
    return parts


def _check(parts: Split, state: dict[str, Tensor], private: dict[int, Tensor]) -> None:
    present = {id(tensor) for tensor in state.values()}
    if missing := [tuple(t.shape) for key, t in private.items() if key not in present]:
        raise StateError(
            f"the model was changed since lock(): private tensors of shapes {missing[:4]} are not "
            f"in its state dict as they are. {_REMEDY}"
        )
    if same := list(_overlapping(parts.shared, private.values())):
        raise StateError(
            f"{', '.join(same[:4])} lies in the same memory as something private (tied by .data or "
            "by a view), so that it would be sent under that name. Give it memory of its own, or "
            "make both one parameter, before lock()."
        )
    if odd := [name for name in parts.shared if LOCK_NAME in name.split(".")]:
        raise StateError(
            f"the model was changed since lock(): {', '.join(odd[:4])} bears the name of a lock "
            f"and belongs to none. {_REMEDY}"
        )
    if len(parts.shared) + len(parts.private) + len(parts.left_out) != len(state):
        raise StateError(
            "two tensors of the model have the same name without its wrappers; wrap the whole "
            "model, or rename the layers before lock()."
        )


def _overlapping(shared: Mapping[str, Tensor], private: Iterable[Tensor]) -> Iterator[str]:
    """Names of shared tensors that lie in the memory of private ones.

    Parts of one vector, as of ``vector_to_parameters``, do not.
    """
    taken: dict[int, list[tuple[int, int]]] = {}
    for tensor in private:
        if place := _place(tensor):
            taken.setdefault(place[0], []).append(place[1])
    for name, tensor in shared.items():
        place = _place(tensor)
        ends = taken.get(place[0], []) if place else []
        if place and any(low < place[1][1] and place[1][0] < high for low, high in ends):
            yield name


def _place(tensor: Tensor) -> tuple[int, tuple[int, int]] | None:
    """Address of the storage, and which bytes of it; None where there are none."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return None
    size = tensor.element_size()
    low = int(tensor.storage_offset()) * size
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    high = low + (1 + sum((int(n) - 1) * int(step) for n, step in sides)) * size
    return tensor.untyped_storage().data_ptr(), (low, high)


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that the module itself holds."""
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _strangers(module: nn.Module, private: dict[int, Tensor], prefix: str) -> Iterator[str]:
    """Names of tensors that came in after lock() where they may see what a pad hides.

    What was there at lock() may not have got any in a private layer; what is new has none, or is
    wrapped around layers that were there and are shared.
    """
    known = module.__dict__.get(_KNOWN)
    if known is None:
        inside = list(module.named_modules(prefix=prefix.removesuffix(".")))
        old = [m for _, m in inside if _KNOWN in m.__dict__]
        if not old or any(_guards(m) for m in old):
            yield from (
                f"{name}.{local}"
                for name, m in inside
                for local, tensor in _own(m).items()
                if _KNOWN not in m.__dict__ and id(tensor) not in private
            )
        return
    if _guards(module):
        own = _own(module).items()
        yield from (f"{prefix}{n}" for n, t in own if n not in known and id(t) not in private)
    for name, child in module.named_children():
        yield from _strangers(child, private, f"{prefix}{name}.")


def _guards(module: nn.Module) -> bool:
    return isinstance(module, LockedNorm) or bool(owned(module))


def _found(holder: nn.Module, private: dict[int, Tensor], covered: set[int]) -> set[str]:
    """Names, as of lock(), of what is private below ``holder``; fills in the tensors by id."""
    names: set[str] = set()
    for module in holder.modules():
        covered.add(id(module))
        tensors: dict[str, Tensor | None] = {}
        if isinstance(module, LockedNorm):
            site: str = module.__dict__[SITE]
            statistics = module.__dict__["_fedkl_statistics"]
            tensors = {f"{site}.{n}": module._buffers.get(n) for n in statistics}
            names.add(f"{site}.{LOCK_NAME}")
            source = source_of(module)
            private |= {id(t): t for t in source.state_dict(keep_vars=True).values()}
        for local, kept in owned(module).items():
            tensors[kept.name] = module._parameters.get(local, module._buffers.get(local))
        for name, tensor in tensors.items():
            if tensor is not None:
                names.add(name)
                private[id(tensor)] = tensor
    return names


def _original_names(root: nn.Module, names: Iterable[str]) -> list[str]:
    """The names without the components that wrappers inside the model put into them."""
    parallel = [
        _plain(f"{prefix}.module.")
        for prefix, module in root.named_modules(remove_duplicate=False)
        if isinstance(module, DataParallel | DistributedDataParallel)
    ]
    result = []
    for name in names:
        name = _plain(name)
        for prefix in sorted(parallel, key=len, reverse=True):
            if name.startswith(prefix):
                name = prefix.removesuffix("module.") + name.removeprefix(prefix)
        result.append(name)
    return result


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        if wrapper in name:
            name = name.replace(wrapper, "")
    return name
