"""One locked model for many clients: start a lock anew, or look at a model under other γ and β."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkl.errors import DataError
from fedkl.key import Key
from fedkl.locking.api import agree, lock_spec, set_key, sources_of, unwrap
from fedkl.locking.schemes import Channel
from fedkl.locking.sites import LOCK_NAME, restore_statistics
from fedkl.locking.sources import KeyedAffine, PrivateAffine
from fedkl.locking.state import private_state


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


def _to_original(norm: nn.Module, source: PrivateAffine) -> None:
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


def calibrate(model: nn.Module, batches: Iterable[Tensor], *, every_norm: bool = False) -> None:
    """Running statistics of the locked batch norms anew, from unlabelled inputs (in place).

    Private statistics belong to the weights a client trained itself; those that come back from the
    server are an average, under which the old statistics are off. A client calibrates before it
    uses a global model (training needs it not: a batch norm then takes the batch's statistics).

    Args:
        model: A locked model; nothing happens if it has no private statistics.
        batches: Inputs of the model; every batch counts the same. A few hundred examples do.
        every_norm: Re-estimate shared batch norms as well.

    Raises:
        DataError: There is no batch. The statistics then stay as they were, as they do when the
            model fails on a batch.
    """
    root = unwrap(model)
    private = private_state(model)
    norms = [
        norm
        for name, norm in root.named_modules()
        if isinstance(norm, _BatchNorm) and norm.track_running_stats
        if every_norm or f"{name}.running_mean" in private
    ]
    if not norms:
        return
    with _gathering(root, norms), torch.no_grad():
        count = 0
        for batch in batches:
            root(batch)
            count += 1
        if count == 0:
            raise DataError(
                "no batch to calibrate on; pass one or more (an iterator gives its batches once)."
            )


@contextmanager
def _gathering(root: nn.Module, norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Within the block ``norms`` alone are in train mode and take cumulative statistics anew."""
    modes = {module: module.training for module in root.modules()}
    momenta = [norm.momentum for norm in norms]
    kept = [(b, b.detach().clone()) for norm in norms for b in norm.buffers(recurse=False)]
    root.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative
            norm.train()
        yield
    except BaseException:
        for buffer, before in kept:
            buffer.copy_(before)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
