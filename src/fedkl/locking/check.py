"""After locking, the example runs again: a lock without effect is an error, not a silent no-op."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedkl.errors import LockError
from fedkl.locking.sites import LOCK_NAME
from fedkl.locking.sources import AffineSource
from fedkl.locking.survey import call, gradients
from fedkl.rng import borrowed, derive


def verify(model: nn.Module, sources: Mapping[str, AffineSource], example: Any) -> None:
    """Runs ``example`` in train, eval and no-grad mode and checks that every lock matters.

    In train or in eval mode the outputs' gradient with respect to every lock's γ or β must not
    vanish: auxiliary heads are absent from eval mode, and in train mode stochastic depth drops
    blocks and a detection loss looks at few outputs. In eval and no-grad mode every lock must be
    read; one that is not is an error unless its layer plays no part there either (auxiliary
    heads). Statistics, modes and gradients are put back.

    Raises:
        LockError: Names the locks without effect, or the mode in which the model fails.
    """
    with restored(model), nothing_zero(model):
        silent = set(sources)
        for mode in ("train", "eval"):
            waiting = {name: source for name, source in sources.items() if name in silent}
            silent = _without_influence(model, waiting, example, mode) if waiting else silent
        if silent:
            raise LockError(
                f"these locks do not change the output on this example: "
                f"{', '.join(sorted(silent))}. The model does not call these modules, or reads "
                "their weights past them, or (in detection) no target reaches them: pass a richer "
                "example, or leave them out with layers=…"
            )
        for grad in (True, False):
            _check_eval(model, sources, example, grad=grad)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Within the block modes and buffers may change; afterwards they are as before.

    Buffers are the same tensors again, also where the model puts new ones in their place.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, name, buffer, before in buffers:
            buffer.copy_(before)
            module._buffers[name] = buffer


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Within the block a model may write into its parameters; afterwards they are as before.

    Apart from :func:`restored`, since of a large model a copy of them all takes its time.
    """
    parameters = [(p, p.detach().clone()) for p in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in parameters:
                if not torch.equal(parameter, before):
                    parameter.copy_(before)


@contextmanager
def nothing_zero(model: nn.Module) -> Iterator[None]:
    """Parameters that start as zeros (heads, residual scales) would hide every influence."""
    zeros = [p for p in model.parameters() if p.is_floating_point() and not bool(p.any())]
    kept = [p.detach().clone() for p in zeros]
    with torch.no_grad():
        for index, p in enumerate(zeros):
            noise = torch.randn(p.shape, generator=derive(0, "zeros", index))
            p.copy_(noise * 0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(zeros, kept, strict=True):
                p.copy_(before)


def _run(model: nn.Module, example: Any, mode: str) -> list[Tensor]:
    try:
        with borrowed(derive(0, "verify")):
            output = call(model, example)
    except Exception as error:
        hint = (
            " A batch norm needs more than one value per channel in train mode: use an example "
            "of at least two inputs."
            if "more than 1 value" in str(error)
            else ""
        )
        raise LockError(
            f"the locked model fails on the example in {mode} mode: "
            f"{type(error).__name__}: {error}.{hint}"
        ) from error
    leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return leaves or _attributes(output)


def _attributes(output: Any) -> list[Tensor]:
    values = vars(output).values() if hasattr(output, "__dict__") else ()
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _without_influence(
    model: nn.Module, sources: Mapping[str, AffineSource], example: Any, mode: str
) -> set[str]:
    """Names of the locks whose γ and β both have no gradient in ``mode``.

    Probed at γ = 1, β = 0: whether a lock is heard is a property of the model, and a narrow
    layer whose own β happens to silence every ReLU behind it is no mistake of the caller's.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in sources}

    def recorder(name: str, compute: Any, value: float) -> Any:
        def record() -> Tensor:
            # What the norm asks for, not what a later lock of the chain asks for.
            seen[name].append(torch.full_like(compute(), value).requires_grad_())
            return seen[name][-1]

        return record

    model.train(mode == "train")
    for name, source in sources.items():
        source.__dict__["scale"] = recorder(name, source.scale, 1.0)
        source.__dict__["shift"] = recorder(name, source.shift, 0.0)
    try:
        with torch.enable_grad():
            outputs = [t for t in _run(model, example, mode) if t.requires_grad]
            # Activation checkpointing asks for more of them on the way back.
            asked = {name: [*found] for name, found in seen.items()}
            values = [value for found in asked.values() for value in found]
            total = sum((_probe(t) for t in outputs), torch.zeros(()))
            grads = iter(gradients(total, values) if outputs and values else [None] * len(values))
    finally:
        for source in sources.values():
            del source.__dict__["scale"], source.__dict__["shift"]
    moved = {
        name: [g for g in [next(grads) for _ in found] if g is not None and _tells(g)]
        for name, found in asked.items()
    }
    return {name for name, found in moved.items() if not found}


def _tells(gradient: Tensor) -> bool:
    """Whether it is other than zero; NaN comes from everywhere and says nothing of a lock."""
    return bool(((gradient != 0) & gradient.isfinite()).any())


def _probe(output: Tensor) -> Tensor:
    """A number that depends on every entry; a plain sum would cancel behind a norm."""
    flat = output.float().reshape(-1)
    weights = torch.randn(flat.shape, generator=derive(0, "probe")).to(flat.device)
    return (flat * weights).sum().cpu()


def _check_eval(
    model: nn.Module, sources: Mapping[str, AffineSource], example: Any, *, grad: bool
) -> None:
    mode = "eval" if grad else "no-grad"
    model.eval()
    for source in sources.values():
        source._witness = set()
    try:
        with torch.set_grad_enabled(grad):
            before = _run(model, example, mode)
        unread = [name for name, source in sources.items() if not source._witness]
    finally:
        for source in sources.values():
            source._witness = None
    bypassed = [n for n in unread if _matters(model, n, example, before, grad=grad)]
    if bypassed:
        raise LockError(
            f"in {mode} mode the model reads past these locks: {', '.join(bypassed)} (it skips the "
            "layer, or a fused inference path does not call it). Lock another norm, or leave them "
            "out with layers=…"
        )


def _matters(
    model: nn.Module, name: str, example: Any, before: list[Tensor], *, grad: bool
) -> bool:
    """Whether the layer that the unread lock ``name`` stands behind changes the output."""
    layer = model.get_submodule(name.rpartition(".")[0])
    parameters = [p for n, p in layer.named_parameters() if LOCK_NAME not in n.split(".")]
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p in parameters:
                p.mul_(-1.5)
        with torch.set_grad_enabled(grad):
            after = _run(model, example, "eval")
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
    return len(before) != len(after) or any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )
