"""Whether something of the input passes the first lock by: then a pad does not hide it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fedkl.errors import LockError
from fedkl.locking.check import _probe, _run, _tells, restored


def passes_by(model: nn.Module, first: str, example: Any) -> bool:
    """Whether the output depends on the input otherwise than through the module ``first``.

    Its output is cut off from what it was made of. What still hears of the input (floating-point
    tensors of the example, embeddings of its indices) goes around it: a shortcut, a second branch,
    the residual stream of a transformer.

    Args:
        model: Locked; runs in eval mode, and is left as it was.
        first: Name of the first locked norm, or of the layer that one was inserted behind.
        example: As of :func:`fedkl.lock`.

    Raises:
        LockError: The model does not run on the example.
    """

    with sources_watched(model, example) as (given, sources):
        handle = model.get_submodule(first).register_forward_hook(_cut)
        try:
            with restored(model), torch.enable_grad():
                model.eval()
                outputs = [t for t in _run(model, given, "eval") if t.requires_grad]
                if not outputs or not sources:
                    return False
                total = sum((_probe(t) for t in outputs), torch.zeros(()))
                found = torch.autograd.grad(total, sources, allow_unused=True)
        finally:
            handle.remove()
    return any(g is not None and _tells(g) for g in found)


@contextmanager
def sources_watched(model: nn.Module, example: Any) -> Iterator[tuple[Any, list[Tensor]]]:
    """The example, and leaves of the graph that tell of it once the model has run on it inside.

    They are its floating-point tensors, and of its indices, which have no gradient, what they are
    looked up as.
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().clone().requires_grad_()
        return value

    given = tree_map(leaf, example)
    sources = [v for v in tree_leaves(given) if isinstance(v, Tensor) and v.requires_grad]

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        sources.append(output.detach().requires_grad_())
        return sources[-1].clone()  # for layers that write into their input

    handles = [module.register_forward_hook(watch) for module in _lookups(model, example)]
    try:
        yield given, sources
    finally:
        for handle in handles:
            handle.remove()


def _lookups(model: nn.Module, example: Any) -> list[nn.Module]:
    """The embeddings that look up something of the example, not positions that are always alike.

    They are called with other indices once the example's are dealt out anew. Where the model does
    not run on those, every embedding is taken for one.
    """
    looked: dict[nn.Module, list[Tensor]] = {
        m: [] for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    }

    def record(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        looked[module].append(args[0] if args else named["input"])

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in looked]
    half: dict[nn.Module, int] = {}
    try:
        with restored(model), torch.no_grad():
            model.eval()
            _run(model, example, "eval")
            half = {module: len(seen) for module, seen in looked.items()}
            _run(model, tree_map(_dealt_anew, example), "eval")
    except LockError:
        return list(looked) if half else []
    finally:
        for handle in handles:
            handle.remove()
    return [
        module
        for module, seen in looked.items()
        if len(seen) != 2 * half[module] or not all(map(torch.equal, seen, seen[half[module] :]))
    ]


def _dealt_anew(value: Any) -> Any:
    """Integers in another order; ones that are all alike as others of the same range."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        return value
    flat = value.flatten()
    rolled = flat.roll(1) if flat.numel() > 1 else flat
    return rolled.view_as(value) if not torch.equal(rolled, flat) else (value == 0).to(value.dtype)


def _cut(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, output)
