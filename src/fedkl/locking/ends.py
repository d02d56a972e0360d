"""Output layers: the parameters that an output follows from without another layer's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fedkl.errors import LockError
from fedkl.locking.check import restored
from fedkl.locking.sizes import has_weights, run, with_gradient
from fedkl.locking.survey import hookable, is_norm, kind_of

Node = Any  # torch.autograd.graph.Node, of which torch has no public constructor or type
# Operations that multiply all of one operand with all of the other, and which operands those are.
_PRODUCTS: Final[dict[str, tuple[int, ...]]] = {
    **dict.fromkeys(["Mm", "Bmm", "Mv", "Dot", "Linear", "Convolution"], (0, 1)),
    **dict.fromkeys(["Cdist", "EuclideanDist"], (0, 1)),
    **dict.fromkeys(["Addmm", "Addmv", "Baddbmm", "Addbmm"], (1, 2)),
}


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


def heads_of(model: nn.Module, order: Sequence[str], example: Any, *, guess: bool) -> list[str]:
    """Names of the parameters of all output layers; behind last norms those of what is before, too.

    Args:
        model: Not yet locked.
        order: Norms, convolutions and linear layers as they run.
        example: As of :func:`fedkl.lock`.
        guess: Whether :func:`head_of` will do where no output has a gradient.

    Raises:
        LockError: The model does not run on the example, or there is no telling what its head is.
    """
    ends = ends_of(model, example)
    if has_weights(model, ends):
        return ends
    if not ends and not guess:
        raise LockError(
            "no output of the model has a gradient in eval mode, so there is no telling which "
            "layer is its head; let it return its logits there, or set head=False."
        )
    last = {id(p) for p in model.get_submodule(head_of(order, model)).parameters()}
    found = [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in last]
    before = ends_of(model, example, norms=False)
    # Weights that are read without a call may lie between that layer and the norm.
    return [*ends, *(before if before and not {*found} & {*before} else found)]


def ends_of(model: nn.Module, example: Any, *, norms: bool = True) -> list[str]:
    """Names of the parameters from which an output follows without another layer's parameters.

    By the graph of the outputs in eval mode, in which what each module puts out is cut off from
    what it was made of. Then an output follows from what some modules put out, which are output
    layers, and from parameters that are read without a call of their own (of the model itself, of a
    module around others, ``F.linear(x, self.fc.weight)``). These count as layers where they are
    multiplied as a matrix: what they are multiplied with is not looked into. Of modules within
    modules the innermost count. Tied parameters have all their names.

    ``norms``: whether norms are layers as others are; otherwise the graph goes on through them.

    Raises:
        LockError: The model does not run on the example.
    """
    parameters = {id(p): p for p in model.parameters()}
    with _cut(model, norms=norms) as made:
        given = tree_map(_leaf, example)
        with restored(model), torch.enable_grad(), with_gradient(parameters.values()):
            outputs = [t for t in run(model, given, train=False) if t.requires_grad]
            # The clone of one that is itself a leaf has a graph as well.
            reached = _reached([t.clone().grad_fn for t in outputs], parameters.__contains__)
    ends = {key for key in reached if key in parameters}
    for name, value in made:
        if id(value) in reached:
            ends |= {id(p) for p in model.get_submodule(name).parameters()}
    return [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in ends]


def _leaf(value: Any) -> Any:
    """A number of the example as what a graph begins with, so that it is no constant there."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_().clone()
    return value


@contextmanager
def _cut(model: nn.Module, *, norms: bool) -> Iterator[list[tuple[str, Tensor]]]:
    """Within the block what layers put out is cut off; filled with them, by the layer's name."""
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
        if any(True for _ in module.parameters(recurse=False))
        and _innermost(module)
        and (norms or not is_norm(module))
    ]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def _innermost(module: nn.Module) -> bool:
    """Whether no layer with parameters runs inside it; torch's own read them without calling."""
    inside = (p for child in module.children() for p in child.parameters())
    return type(module).__module__.startswith("torch.nn.") or next(inside, None) is None


def _reached(roots: list[Node], ours: Callable[[int], bool]) -> set[int]:
    """Ids of the leaves that ``roots`` follow from without going past a matrix of parameters.

    ``ours``: whether an id is that of a parameter.
    """
    fixed = _made_of_parameters(roots, ours)
    found: set[int] = set()
    seen: set[Node] = set()
    stack = [*roots]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))
        inner = [n for n, _ in node.next_functions]
        factors = _PRODUCTS.get(node.name().rpartition("Backward")[0], ())
        layer = any(fixed.get(inner[i], False) for i in factors)
        stack += [
            n
            for i, n in enumerate(inner)
            if n is not None and not (layer and i in factors and not fixed[n])
        ]
    return found


def _made_of_parameters(roots: Iterable[Node], ours: Callable[[int], bool]) -> dict[Node, bool]:
    """Of every node below ``roots``: whether it is made of parameters and of nothing else."""
    fixed: dict[Node, bool] = {}
    stack = [(node, False) for node in roots]
    while stack:
        node, ready = stack.pop()
        inner = [n for n, _ in node.next_functions if n is not None]
        if ready:
            leaf = ours(id(getattr(node, "variable", None)))
            fixed[node] = all(fixed[n] for n in inner) if inner else leaf
        elif node not in fixed:
            fixed[node] = False
            stack += [(node, True), *((n, False) for n in inner)]
    return fixed
