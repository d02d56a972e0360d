"""Whether something of the input passes the first lock by: then a pad does not hide it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fedkl.locking.check import _probe, _run, _tells, restored


def passes_by(model: nn.Module, first: str, stem: Collection[str], example: Any) -> bool:
    """Whether the output depends on the input otherwise than through the module ``first``.

    Its output is cut off from what it was made of. What still hears of the input (floating-point
    tensors of the example, embeddings in the stem) goes around it: a shortcut, a second branch,
    the residual stream of a transformer.

    Args:
        model: Locked; runs in eval mode, and is left as it was.
        first: Name of the first locked norm, or of the layer that one was inserted behind.
        stem: Names of the private parameters before it.
        example: As of :func:`fedkl.lock`.

    Raises:
        LockError: The model does not run on the example.
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().clone().requires_grad_()
        return value

    given = tree_map(leaf, example)
    inputs: list[Tensor] = []
    tree_map(
        lambda v: inputs.append(v) if isinstance(v, Tensor) and v.requires_grad else None, given
    )
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    # What is tied to a layer behind the lock would be heard there, without any input.
    embeddings = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if f"{name}.weight" in stem and uses.count(id(module.weight)) == 1
    ]
    handle = model.get_submodule(first).register_forward_hook(_cut)
    try:
        with restored(model), torch.enable_grad():
            model.eval()
            outputs = [t for t in _run(model, given, "eval") if t.requires_grad]
            sources = [*inputs, *embeddings]
            if not outputs or not sources:
                return False
            total = sum((_probe(t) for t in outputs), torch.zeros(()))
            found = torch.autograd.grad(total, sources, allow_unused=True)
    finally:
        handle.remove()
    return any(g is not None and _tells(g) for g in found)


def _cut(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, output)
