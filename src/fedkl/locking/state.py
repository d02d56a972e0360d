"""The split of a locked model's tensors: what may leave the client, and what never does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedkl.errors import LockError, StateError
from fedkl.locking.holder import is_locked, lock_spec, unwrap
from fedkl.locking.pad import PadAffine
from fedkl.locking.sites import locked_norms, source_of
from fedkl.locking.split import split

_SHOWN = 5  # names listed per kind of mismatch


def private_names(model: nn.Module) -> set[str]:
    """Names of the tensors in the model's state dict that must not leave the client.

    Raises:
        StateError: As :func:`shared_state`.
    """
    return set(split(model).private)


def shared_state(model: nn.Module) -> dict[str, Tensor]:
    """What may leave the client: the state dict under the original names, without the lock.

    The tensors are detached but not copied; clone them before training goes on. Only one that
    shares its memory with others is a copy, since serializers write the whole of it. Integer
    buffers such as ``num_batches_tracked`` of shared norms are in it and must not be averaged.
    Extra state of a module (``get_extra_state``), and what hooks add to the state dict, is not in
    it, nor in the private state: it may be anything. :func:`fedkl.lock` warns of it; the model's
    own ``state_dict()`` has it.

    Raises:
        LockError: The model is not locked, so all of it would be sent.
        StateError: The model was changed since ``lock()`` so that what is private cannot be told
            from the rest (a weight norm, pruning or adapter of a private layer, a new or replaced
            layer), or it is a part of a locked model. Wrappers that keep the tensors and adapters
            of shared layers do no harm.
    """
    shared = shared_views(model)
    if not is_locked(model):
        raise LockError(
            f"this {type(unwrap(model)).__name__} is not locked, so nothing of it would stay with "
            "the client; pass what lock(model, key) returned, or send model.state_dict() if "
            "everything may go."
        )
    return {n: _alone(t) for n, t in shared.items()}


def shared_views(model: nn.Module) -> dict[str, Tensor]:
    """As :func:`shared_state`, of a model without a lock too, and always the model's own memory.

    For code that writes into the model, or that has its own rule about what may be sent.

    Raises:
        StateError: As :func:`shared_state`.
    """
    return _views(split(model).shared)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is a view: ``torch.save`` writes all of what it is a view of.

    After ``vector_to_parameters`` all parameters, private ones too, are views of one vector.
    """
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return tensor
    whole = tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def private_state(model: nn.Module) -> dict[str, Tensor]:
    """What stays: lock parameters, statistics of locked norms, private layers. Never the key.

    Together with :func:`shared_state` this is the whole state dict but for extra state, with
    nothing in both. It does not say which key it belongs to: keep ``key.fingerprint`` next to it,
    as the metadata of its file, say.

    Raises:
        LockError: The model is not locked, so nothing of it is private.
        StateError: As :func:`shared_state`.
    """
    found = private_views(model)
    _check_locked(model, "nothing of it is private")
    return found


def private_views(model: nn.Module) -> dict[str, Tensor]:
    """As :func:`private_state`; empty for a model without a lock.

    Raises:
        StateError: As :func:`shared_state`.
    """
    return _views(split(model).private)


def _check_locked(model: nn.Module, so: str) -> None:
    if not is_locked(model):
        raise LockError(
            f"this {type(unwrap(model)).__name__} is not locked, so {so}; pass what "
            "lock(model, key) returned."
        )


def _views(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in tensors.items()}


def load_shared_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies ``state`` into the model (in place), over exactly the names of its shared state.

    Raises:
        StateError: Names are missing or unexpected, shapes or dtypes differ, or a tensor holds NaN
            or infinity; nothing is copied.
    """
    own = shared_views(model)
    fit(own, state, "shared state")
    _check_finite(state, "shared state", "ask for an earlier one")
    copy_state(own, state, "shared state")


def load_private_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies a client's own private tensors into its locked model (in place).

    A pad of another epoch than the model's is refused when the model runs; ``set_key`` draws it.
    A state of another key is taken, for the tensors do not tell, and makes a model that works as
    under a wrong key: compare ``key.fingerprint`` with the one that was kept next to the state, as
    runs, the Flower client and ``examples/own-loop`` do.

    Raises:
        LockError: As :func:`private_state`.
        StateError: As :func:`load_shared_state`.
    """
    own = private_state(model)
    fit(own, state, "private state")
    _check_finite(state, "private state", "go on from one that the client saved before")
    copy_state(own, state, "private state")
    for _, norm in locked_norms(unwrap(model)):
        if isinstance(source := source_of(norm), PadAffine):
            source.notice_epoch()


def state_problems(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> list[str]:
    """How ``got`` differs from ``expected`` in names, shapes and dtypes; empty if it does not.

    Of many tensors that differ the first five are named.
    """
    problems, odd = [], []
    if missing := [n for n in expected if n not in got]:
        problems.append(f"missing {_some(missing)}")
    if extra := [n for n in got if n not in expected]:
        problems.append(f"unexpected {_some(extra)}")
    for name in expected:
        if name in got and not isinstance(got[name], Tensor):
            odd.append(f"{name} is a {type(got[name]).__name__}, expected a tensor")
        elif name in got and got[name].shape != expected[name].shape:
            want, have = tuple(expected[name].shape), tuple(got[name].shape)
            odd.append(f"{name} has shape {have}, expected {want}")
        elif name in got and got[name].dtype != expected[name].dtype:
            odd.append(f"{name} is {got[name].dtype}, expected {expected[name].dtype}")
    problems += odd[:_SHOWN]
    if len(odd) > _SHOWN:
        problems.append(f"and {len(odd) - _SHOWN} more tensors")
    return problems


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _check_finite(state: Mapping[str, Tensor], what: str, remedy: str) -> None:
    tensors = {n: t for n, t in state.items() if isinstance(t, Tensor)}
    if bad := [n for n, t in tensors.items() if not bool(torch.isfinite(t).all())]:
        raise StateError(
            f"this {what} holds NaN or infinity in {_some(bad)}; nothing was copied. The model "
            f"that it is of has diverged or was made to: {remedy}."
        )


def fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Raises unless names, shapes and dtypes of ``state`` are those of ``own``.

    Raises:
        StateError: They differ, or ``state`` is no mapping; ``what`` names it in the message.
    """
    if not isinstance(state, Mapping):
        raise StateError(
            f"expected a {what} (a dict of tensors by name), got {type(state).__name__}; pass what "
            f"{what.replace(' ', '_')}(model) gives."
        )
    if problems := state_problems(own, state):
        raise StateError(
            f"this {what} does not fit the model: {'; '.join(problems)}. {_remedy(own, state)}"
        )


def _remedy(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What to do about a state that does not fit: one that was averaged or converted still can."""
    kept = own.keys() == state.keys() and all(
        isinstance(t, Tensor) and t.shape == own[n].shape for n, t in state.items()
    )
    if not kept:
        return "Use a state of the same architecture and lock spec."
    if any(t.is_floating_point() and not own[n].is_floating_point() for n, t in state.items()):
        return "Average no integers such as num_batches_tracked: take them from one client."
    return "Convert it to the model's dtypes first."


def copy_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Copies ``state`` into the tensors ``own`` (in place), over exactly their names.

    Raises:
        StateError: As :func:`load_shared_state`; ``what`` names the state in the message.
    """
    fit(own, state, what)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises unless ``optimizer`` holds every parameter of every lock and private layer.

    Raises:
        LockError: Names the missing parameters; happens when the optimizer was built before
            :func:`lock`, which returns a copy with new parameters. Or the model is not locked.
        StateError: As :func:`shared_state`.
    """
    held = held_by(optimizer)
    private = split(model).private
    lock_spec(model)
    lacking = {
        id(p): name
        for name, p in reversed(private.items())  # a tied one by its first name
        if isinstance(p, nn.Parameter) and p.requires_grad and id(p) not in held
    }
    missing = list(reversed(lacking.values()))
    if missing:
        raise LockError(
            f"the optimizer does not hold {len(missing)} lock parameter(s): "
            f"{', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}. Build it after lock(), "
            "from the locked model's parameters()."
        )


def held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of the parameters that ``optimizer`` holds.

    Raises:
        LockError: It is no optimizer.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise LockError(
            f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}; pass the one that "
            "was built from the locked model's parameters()."
        )
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
