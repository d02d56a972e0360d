"""Whether something of the input passes the first lock by: then a pad does not hide it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fedkl.errors import LockError
from fedkl.locking.check import _probe, _run, _tells, nothing_zero, restored, weights_kept
from fedkl.locking.sizes import stem_of
from fedkl.locking.survey import gradients


def passes_by(model: nn.Module, first: str, example: Any) -> bool:
    """Whether the output depends on the input otherwise than through the module ``first``.

    Its output is cut off from what it was made of. What still hears of the input (floating-point
    tensors of the example, embeddings of its indices) goes around it: a shortcut, a second branch,
    the residual stream of a transformer. In train mode too, for what is an input and no target.
    What gradients do not tell, such as frozen features without a graph, values do: with the output
    of ``first`` played back, another example has to give the same; and in train mode leave the same
    behind in the tensors of what runs later.

    Args:
        model: Locked; is left as it was.
        first: Name of the first locked norm, or of the layer that one was inserted behind.
        example: As of :func:`fedkl.lock`.

    Raises:
        LockError: The model does not run on the example.
    """
    with nothing_zero(model):
        return (
            any(_hears(model, first, example, mode) for mode in ("eval", "train"))
            or _differs(model, first, example)
            or _remembers(model, first, example)
        )


def _hears(model: nn.Module, first: str, example: Any, mode: str) -> bool:
    """The same by gradients; in train mode of what ``first`` hears too, which no target is."""
    passed: list[Tensor] = []

    def cut(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        passed.extend(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad)
        return tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, output)

    with sources_watched(model, example) as (given, sources):
        handle = model.get_submodule(first).register_forward_hook(cut)
        try:
            with restored(model), torch.enable_grad():
                model.train(mode == "train")
                outputs = [t for t in _run(model, given, mode) if t.requires_grad]
                around = _told(outputs, sources)
                if mode == "train":
                    around &= _told(passed, sources)
        finally:
            handle.remove()
    return bool(around)


def _told(outputs: list[Tensor], sources: list[Tensor]) -> set[int]:
    """Which of ``sources`` the outputs depend on, by place."""
    if not outputs or not sources:
        return set()
    total = sum((_probe(t) for t in outputs), torch.zeros(()))
    # The graph is asked twice: by way of the lock's output, and without it.
    found = gradients(total, sources, retain_graph=True)
    return {i for i, g in enumerate(found) if g is not None and _tells(g)}


def _differs(model: nn.Module, first: str, example: Any) -> bool:
    """The same by values in eval mode: of other numbers, or of indices that gradients miss.

    Of indices those count that ``first`` hears, as labels do not.
    """
    leaves = [v for v in tree_leaves(example) if isinstance(v, Tensor)]
    if any(v.is_floating_point() for v in leaves):
        other = tree_map(_other, example)
        return _played_back(model, first, example, other, heard=False)
    if _lookups(model, example):
        return False
    return any(
        _played_back(
            model,
            first,
            example,
            tree_map(lambda v, one=one: _dealt_anew(v) if v is one else v, example),
            heard=True,
        )
        for one in leaves
    )


def _remembers(model: nn.Module, first: str, example: Any) -> bool:
    """The same by tensors that would be sent, such as a running mean of the input kept at the end.

    Those of the stem and of ``first`` are another matter: they are private unless asked for.
    """
    stem, kept = {*stem_of(model, example, first)}, model.state_dict(keep_vars=True)
    tensors = _tensors(model)
    # By what they are: a norm in two places has two names.
    mine = {id(tensors[name]) for name in tensors if name in stem or name.startswith(f"{first}.")}
    late = [
        name
        for name, value in tensors.items()
        if name in kept and value.is_floating_point() and id(value) not in mine
    ]
    # A mean does not hear of another order.
    other = tree_map(lambda v: v if v is (new := _other(v)) else 0.5 * new + 0.1, example)
    return bool(late) and _played_back(model, first, example, other, heard=False, late=late)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    named = model.named_parameters(remove_duplicate=False)
    return {**dict(named), **dict(model.named_buffers(remove_duplicate=False))}


def _played_back(
    model: nn.Module,
    first: str,
    example: Any,
    other: Any,
    *,
    heard: bool,
    late: Collection[str] = (),
) -> bool:
    """Whether ``other`` gives another output while ``first`` puts out what ``example`` makes it.

    ``heard``: and by itself ``first`` would not. ``late``: tensors that are looked at instead of
    the output, in train mode.
    """
    played: list[Any] = []
    changed: list[bool] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        played.append(_copied(output))

    def replay(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        before = played.pop(0)
        changed.append(apart(tree_leaves(before), tree_leaves(output)))
        return _copied(before)

    outputs = []
    for hook, given in ((keep, example), (replay, other)):
        handle = model.get_submodule(first).register_forward_hook(hook)
        try:
            kept = weights_kept(model) if late else nullcontext()
            with restored(model), kept, torch.enable_grad():
                made = _run(model.train(bool(late)), given, "train" if late else "eval")
                now = _tensors(model)
                outputs.append([now[name].detach().clone() for name in late] if late else made)
        except LockError:
            return False  # it takes no others, or their values decide what runs
        finally:
            handle.remove()
    return apart(*outputs) and (any(changed) or not heard)


def apart(ones: list[Any], others: list[Any]) -> bool:
    """Whether tensors of two lists differ by more than rounding; only those of one shape count."""
    return any(
        isinstance(a, Tensor)
        and a.shape == b.shape
        and not torch.equal(a, b)  # which takes a large model less time
        and not torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
        for a, b in zip(ones, others, strict=False)
    )


def _copied(value: Any) -> Any:
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, value)


def _other(value: Any) -> Any:
    """The numbers of a tensor in another order; integers as they are."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    rolled = value.flatten().roll(1).view_as(value)
    return rolled if not torch.equal(rolled, value) else value + 0.5


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
