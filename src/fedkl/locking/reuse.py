"""One locked model for many clients: start a lock anew, or look at a model under other γ and β."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedkl.errors import ConfigError, LockError
from fedkl.key import Key
from fedkl.locking.api import agree, check_random, set_key
from fedkl.locking.holder import lock_spec, sources_of, unwrap
from fedkl.locking.pad import OpenPad, Pad, PadAffine
from fedkl.locking.schemes import Channel
from fedkl.locking.sites import LOCK_NAME, PositionalNorm, restore_statistics
from fedkl.locking.sources import KeyedAffine, PrivateAffine
from fedkl.locking.state import held_by
from fedkl.locking.stem import draw_private, restore


def restart_lock(model: nn.Module, key: Key | None, group: Key | None = None) -> None:
    """Puts the private state back to where :func:`fedkl.lock` starts it for these keys (in place).

    A model locked once serves any number of clients: this is what a client that has no private
    state yet begins with.
    """
    spec = lock_spec(model)
    scheme = spec.scheme_value()
    if isinstance(scheme, Channel):
        assert key is not None
        set_key(model, key)
    root = unwrap(model)
    if isinstance(scheme, Pad):
        assert key is not None
        check_random(key)
        _redraw(model, scheme, key, 0)
        draw_private(root, key)
    elif isinstance(scheme, OpenPad):
        restore(root, parameters=True)
    for site, source in sources_of(model).items():
        norm = root.get_submodule(site)
        if isinstance(source, KeyedAffine) and isinstance(scheme, Channel):
            assert key is not None
            scheme.initialize(source, key.stream(site), chained=source.chained)
        elif isinstance(source, PrivateAffine):
            _to_original(norm, source)
        restore_statistics(norm)
    if group is not None:
        agree(model, group)


def renew(
    model: nn.Module,
    key: Key,
    epoch: int,
    *,
    keep_learned: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Puts the pad of another epoch into a locked model (in place).

    What was learned on top belongs to the old pad and starts again, unless ``keep_learned``; so do
    the gradients of it that no step has taken yet, as where they are accumulated.
    Private layers (stem, head) stay, the key as well: who has it can draw every epoch's pad.

    Args:
        model: Locked with scheme ``pad``.
        key: The client's key, the one that drew the present pad.
        epoch: Number of the pad, above :func:`epoch_of` and below 2**63.
        keep_learned: Whether learned maps stay.
        optimizer: The client's. Its moments of the learned maps are dropped along with them, or
            the next step would add what was learned under the old pad; of ``LBFGS``, whose history
            is one for all parameters, all of it. It need not hold the whole model; what of the
            learned maps it holds is looked after.

    Raises:
        LockError: The scheme has no pad, ``key`` is none or another, or ``optimizer`` is none or
            holds none of the learned maps that are trained. Nothing is changed.
        ConfigError: ``epoch`` is no integer above the present one. Nothing is changed.
    """
    if not isinstance(key, Key):
        raise LockError(f"expected a fedkl.Key, got {type(key).__name__}.")
    spec = lock_spec(model)
    scheme = spec.scheme_value()
    if not isinstance(scheme, Pad):
        raise LockError(f"scheme {spec.scheme!r} has no pad to renew; lock with scheme='pad'.")
    check_random(key)
    now = epoch_of(model)
    if type(epoch) is not int or not now < epoch < 2**63:
        raise ConfigError(
            f"the next pad's epoch must be an integer above the present one, {now}, and below "
            f"2**63, got {epoch!r:.40}: no pad is used twice. restart_lock starts again from 0."
        )
    owners = {s.owner for s in sources_of(model).values() if isinstance(s, PadAffine)}
    if owners != {key.fingerprint}:
        raise LockError(
            f"this pad was drawn from key {', '.join(sorted(owners))}, got {key.fingerprint}; "
            "renew it with the same key, or put another in with set_key(model, key) first."
        )
    if optimizer is not None:
        _check_holds(optimizer, model)
    _redraw(model, scheme, key, epoch, keep_learned=keep_learned)
    if keep_learned:
        return
    for parameter in _learned(model):
        parameter.grad = None
    if optimizer is not None:
        _forget(optimizer, _learned(model))


def _learned(model: nn.Module) -> list[nn.Parameter]:
    return [p for source in sources_of(model).values() for p in source.parameters()]


def _check_holds(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    held = held_by(optimizer)
    trained = [p for p in _learned(model) if p.requires_grad]
    if trained and not any(id(p) in held for p in trained):
        raise LockError(
            "the optimizer holds none of this model's learned maps, so what it remembers is "
            "another model's; pass the one that was built, after lock(), from this model's "
            "parameters(), or none if the learned maps are not trained."
        )


def _forget(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Drops what ``optimizer`` remembers of ``parameters`` (in place)."""
    held = held_by(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS) and any(id(p) in held for p in parameters):
        # One history, of all parameters as one vector, kept under the first of them.
        optimizer.state.clear()
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def _redraw(
    model: nn.Module, scheme: Pad, key: Key, epoch: int, *, keep_learned: bool = False
) -> None:
    for source in sources_of(model).values():
        assert isinstance(source, PadAffine)
        scheme.redraw(source, key, epoch)
        if not keep_learned:
            source.restart()


def draw_layers(model: nn.Module, key: Key) -> None:
    """Private layers (stem, head) anew from ``key`` (in place); nothing happens without any.

    Raises:
        LockError: The model is not locked.
    """
    lock_spec(model)
    draw_private(unwrap(model), key)


def epoch_of(model: nn.Module) -> int:
    """Which pad a model locked with scheme ``pad`` has; 0 for other schemes."""
    for source in sources_of(model).values():
        if isinstance(source, PadAffine):
            return int(source.epoch)
    return 0


def _to_original(norm: nn.Module, source: PrivateAffine) -> None:
    if isinstance(norm, PositionalNorm):
        with torch.no_grad():
            source.gamma.fill_(1.0)
            source.beta.zero_()
        return
    original = norm.__dict__["_fedkl_original"]
    weight, bias = original["weight"], original["bias"]
    with torch.no_grad():
        source.gamma.copy_(weight) if weight is not None else source.gamma.fill_(1.0)
        source.beta.copy_(bias) if bias is not None else source.beta.zero_()


@contextmanager
def replaced_affines(
    model: nn.Module, values: Mapping[str, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Within the block the named sites use the given (γ, β) instead of their lock.

    This is how a thief without key and lock runs the global model: with γ = 1 and β = 0, or with
    a guess. The lock is back afterwards.
    """
    root = unwrap(model)
    kept = sources_of(model)
    try:
        for site, (scale, shift) in values.items():
            root.get_submodule(site)._modules[LOCK_NAME] = PrivateAffine(scale, shift)
        yield
    finally:
        for site in values:
            root.get_submodule(site)._modules[LOCK_NAME] = kept[site]
