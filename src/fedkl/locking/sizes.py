"""What only a run on the example shows: activation sizes, and what lies before the first lock."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedkl.errors import LockError
from fedkl.locking.check import restored
from fedkl.locking.sites import affine_shape, current_affine
from fedkl.locking.survey import call, does_not_run, gradients, hookable, is_norm
from fedkl.rng import borrowed, derive

Size = tuple[int, ...]


def activation_sizes(
    model: nn.Module, example: Any, names: Collection[str], *, inputs: bool = False
) -> dict[str, Size]:
    """Size per example of what each named module puts out (or takes in), without the batch axis.

    Runs in eval mode, and in train mode if a module (an auxiliary head) has not run there.

    Raises:
        LockError: A module runs at two sizes, or not at all.
    """
    found: dict[str, set[Size]] = {name: set() for name in names}

    def hook(name: str) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            value = args[0] if inputs and args else output
            if isinstance(value, Tensor):
                found[name].add(tuple(value.shape[1:]))

        return record

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    try:
        for mode in (False, True):
            if not all(found.values()):
                with restored(model):
                    run(model, example, train=mode)
    finally:
        for handle in handles:
            handle.remove()
    if silent := [name for name, sizes in found.items() if not sizes]:
        raise LockError(
            f"{', '.join(silent)} does not run on this example, so the size of its lock is "
            "unknown; pass a richer example, or leave it out with layers=…"
        )
    if several := {n: sorted(s) for n, s in found.items() if len(s) > 1}:
        raise LockError(
            f"these modules run at two sizes, and a lock per position has one: {several}. Leave "
            "them out with layers=…, give each call a norm of its own, or use scheme='channel'."
        )
    return {name: sizes.pop() for name, sizes in found.items()}


def run(model: nn.Module, example: Any, *, train: bool) -> list[Tensor]:
    """The tensors that ``model`` makes of the example in one of its modes, with a graph.

    Raises:
        LockError: It does not run.
    """
    with torch.enable_grad(), borrowed(derive(0, "sizes")):
        model.train(train)
        try:
            output = call(model, example)
        except Exception as error:
            raise does_not_run(model, example, error) from error
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def feature_axis(norm: nn.Module, name: str, shape: Size) -> int:
    """Axis of ``shape``, a norm's output without the batch, along which the entries of its γ lie.

    Seen from what moves in that output with the first entry.

    Args:
        norm: Not yet locked; left as it was. Its γ has one axis.
        name: Its name in the model.
        shape: What it puts out for one example.

    Raises:
        LockError: There is no telling.
    """
    features = affine_shape(norm)
    like = current_affine(norm)[0]
    x = torch.randn((2, *shape), generator=derive(0, "feature axis")).to(like.device, like.dtype)
    found: list[int] = []
    with suppress(Exception):
        one, two = (_with_first_entry(norm, x, value) for value in (1.0, 2.0))
        moved = (one != two).any(0).nonzero()
        found = [
            axis
            for axis in range(len(shape))
            if features == (shape[axis],) and set(moved[:, axis].tolist()) == {0}
        ]
    if len(found) != 1:
        raise LockError(
            f"where the channels of {name} ({type(norm).__name__}) lie in its output {shape} is "
            "not to be seen, and learned='channel' has to know; take learned='position', or leave "
            "it out with layers=…"
        )
    return found[0]


def _with_first_entry(norm: nn.Module, x: Tensor, value: float) -> Tensor:
    """What the norm makes of ``x`` in eval mode with γ = (value, 1, 1, …)."""
    own = norm._parameters["weight"]
    scale = torch.ones(affine_shape(norm), device=x.device, dtype=x.dtype)
    scale[0] = value
    norm._parameters["weight"] = nn.Parameter(scale)
    try:
        with restored(norm), torch.no_grad():
            made: Tensor = norm.eval().forward(x)
            return made
    finally:
        norm._parameters["weight"] = own


def stem_of(model: nn.Module, example: Any, first: str) -> list[str]:
    """Names of the tensors that the output of ``first`` depends on: the stem, that module's too.

    Parameters by the gradient of that output, in eval or in train mode, and the buffers of every
    module that has begun to run by then, which are functions of private inputs or weights (running
    means, power iterations), or has a parameter in the stem. Tied parameters under all their names.
    """
    stem, before = _before(model, example, first, train=False)
    try:
        more, also = _before(model, example, first, train=True)
    except LockError:
        pass  # told where the lock is verified
    else:
        stem, before = stem | more, before | also
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in stem]
    locked = model.get_submodule(first)
    for name, module in model.named_modules(remove_duplicate=False):
        owns = any(id(p) in stem for p in module.parameters(recurse=False))
        # Statistics of a locked norm are the lock's affair.
        ours = module is locked and is_norm(module)
        if not ours and (owns or module in before):
            dot = f"{name}." if name else ""
            names += [f"{dot}{n}" for n, _ in module.named_buffers(recurse=False)]
    return names


def has_weights(model: nn.Module, stem: Collection[str]) -> bool:
    """Whether a stem has parameters besides those of norms, which start alike for everybody."""
    known = {
        f"{name}.{n}".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if is_norm(module)
        for n, _ in module.named_parameters(recurse=False)
    }
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    return any(n in parameters and n not in known for n in stem)


def _before(
    model: nn.Module, example: Any, first: str, *, train: bool
) -> tuple[set[int], set[nn.Module]]:
    """Ids of the parameters in the output of ``first``, and the modules begun before that."""
    parameters = [p for p in model.parameters() if _differentiable(p)]
    outputs: list[Tensor] = []
    before: set[nn.Module] = set()
    # Scripted modules take no hooks: those have run whose buffers move.
    scripted = [
        (module, buffer, buffer.detach().clone())
        for module in model.modules()
        if isinstance(module, torch.jit.ScriptModule)
        for buffer in module.buffers(recurse=False)
    ]

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not outputs:
            before.add(module)

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not outputs:
            before.update(module for module, b, was in scripted if not torch.equal(b, was))
        outputs.extend(t for t in tree_leaves(output) if isinstance(t, Tensor))

    handles = [module.register_forward_pre_hook(begin) for _, module in hookable(model)]
    handles.append(model.get_submodule(first).register_forward_hook(end))
    try:
        # Backward before the buffers are put back, which would spoil it.
        with restored(model), torch.enable_grad(), with_gradient(parameters):
            run(model, example, train=train)
            total = sum((_energy(t) for t in outputs), torch.zeros(()))
            used = gradients(total, parameters) if total.requires_grad else [None] * len(parameters)
    finally:
        for handle in handles:
            handle.remove()
    found = {id(p) for p, g in zip(parameters, used, strict=True) if g is not None}
    return found, before if outputs else set()


def _differentiable(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _energy(value: Tensor) -> Tensor:
    return (torch.view_as_real(value) if value.is_complex() else value).float().square().sum()


@contextmanager
def with_gradient(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block frozen parameters are in the graph as well."""
    frozen = [p for p in parameters if _differentiable(p) and not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
