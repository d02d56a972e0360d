"""What only a run on the example shows: activation sizes, and what lies before the first lock."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fedkl.errors import LockError
from fedkl.locking.check import restored
from fedkl.locking.survey import call, does_not_run, gradients, hookable, is_norm, kind_of
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
                    _run(model, example, train=mode)
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


def _run(model: nn.Module, example: Any, *, train: bool) -> list[Tensor]:
    with torch.enable_grad(), borrowed(derive(0, "sizes")):
        model.train(train)
        try:
            output = call(model, example)
        except Exception as error:
            raise does_not_run(model, example, error) from error
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def head_of(order: Sequence[str], model: nn.Module) -> str:
    """The classifier: the last linear layer that runs, or else the last convolution.

    Raises:
        LockError: There is neither.
    """
    for kind in ("linear", "convolution"):
        for name in reversed(order):
            if kind_of(model.get_submodule(name)) == kind:
                return name
    raise LockError("the model has no linear layer or convolution that could be its head.")


def check_batch_axis(model: nn.Module, example: Any, sizes: Mapping[str, Size]) -> None:
    """Raises unless axis 0 is the batch where the locks stand: on twice the batch they fit as well.

    Models of tokens may keep them in axis 0 and the batch behind (``batch_first=False``). A pad
    would then have one γ and β per example of the batch, and all tokens would share them.

    Args:
        model: Not yet locked.
        example: As of :func:`fedkl.lock`.
        sizes: Size per example by module's name, as :func:`activation_sizes` gives it.

    Raises:
        LockError: It is not.
    """
    batches = [len(t) for t in tree_leaves(example) if isinstance(t, Tensor) and t.ndim]
    if not batches:
        return
    batch = batches[0]

    def doubled(value: Any) -> Any:
        ours = isinstance(value, Tensor) and value.ndim and len(value) == batch
        return torch.cat([value, value]) if ours else value

    try:
        after = activation_sizes(model, tree_map(doubled, example), list(sizes))
    except LockError:
        return  # not made of a batch that could be doubled
    ends = _first_axes(model, example)
    turned = any(
        isinstance(t, Tensor) and t.ndim in (2, 3) and {t.shape[1]} == ends != {t.shape[0]}
        for t in tree_leaves(example)
    )
    if turned or after != sizes:
        raise LockError(
            "the batch is not the first axis where the locks stand (tokens come first, as with "
            "batch_first=False), so that a pad would hang on examples instead of positions; build "
            "the model with batch_first=True, or use scheme='channel'."
        )


def _first_axes(model: nn.Module, example: Any) -> set[int]:
    """Lengths of the first axis of the model's outputs."""
    with restored(model), torch.no_grad():
        model.eval()
        leaves = tree_leaves(call(model, example))
    return {len(t) for t in leaves if isinstance(t, Tensor) and t.ndim}


def ends_of(model: nn.Module, example: Any) -> list[str]:
    """Output layers: modules from which the output follows without another one's parameters.

    By the gradient of the output in eval mode with respect to what each module puts out, cut off
    from what it was made of. Of modules within modules the innermost count.

    Raises:
        LockError: The model does not run on the example.
    """
    made: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            def cut(value: Any) -> Any:
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    return value
                made.append((name, value.detach().requires_grad_()))
                return made[-1][1].clone()  # for layers that write into their input

            return tree_map(cut, output)

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in hookable(model)
        if any(True for _ in module.parameters(recurse=False)) and _innermost(module)
    ]
    try:
        with restored(model), torch.enable_grad():
            outputs = [t for t in _run(model, example, train=False) if t.requires_grad]
            total = sum((_energy(t) for t in outputs), torch.zeros(()))
            values = [value for _, value in made]
            grads = gradients(total, values) if outputs else ()
    finally:
        for handle in handles:
            handle.remove()
    found = (name for (name, _), grad in zip(made, grads, strict=False) if grad is not None)
    return list(dict.fromkeys(found))


def _innermost(module: nn.Module) -> bool:
    """Whether no layer with parameters runs inside it; torch's own read them without calling."""
    inside = (p for child in module.children() for p in child.parameters())
    return type(module).__module__.startswith("torch.nn.") or next(inside, None) is None


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


def _before(
    model: nn.Module, example: Any, first: str, *, train: bool
) -> tuple[set[int], set[nn.Module]]:
    """Ids of the parameters in the output of ``first``, and the modules begun before that."""
    parameters = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
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
        with restored(model), torch.enable_grad(), _all_with_gradient(parameters):
            _run(model, example, train=train)
            total = sum((_energy(t) for t in outputs), torch.zeros(()))
            used = gradients(total, parameters) if total.requires_grad else [None] * len(parameters)
    finally:
        for handle in handles:
            handle.remove()
    found = {id(p) for p, g in zip(parameters, used, strict=True) if g is not None}
    return found, before if outputs else set()


def _energy(value: Tensor) -> Tensor:
    return (torch.view_as_real(value) if value.is_complex() else value).float().square().sum()


@contextmanager
def _all_with_gradient(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
