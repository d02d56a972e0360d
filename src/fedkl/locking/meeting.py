"""Where all ways from the input to the output meet: a lock there has nothing go around it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from copy import deepcopy
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedkl.errors import LockError, ShortcutWarning
from fedkl.locking.behind import check_behind, room_behind
from fedkl.locking.check import _probe, _run, restored
from fedkl.locking.holder import unwrap
from fedkl.locking.install import Plan, remove, site_name
from fedkl.locking.passing import passes_by, sources_watched
from fedkl.locking.sizes import has_weights, stem_of
from fedkl.locking.survey import hookable, trace

_TRIED: Final = 8
Node = Any  # torch.autograd.graph.Node, of which torch has no public constructor or type
Passed = tuple[Node, int]  # one of the tensors that a node puts out


def meeting_points(model: nn.Module, example: Any) -> list[str]:
    """Names of the modules whose output every way from the input passes, as they run.

    By the graph of one run in eval mode: with its operations in an order in which each comes
    behind what it is made of, one that no edge leaps over is on every way. Of modules that put
    out the same tensor the outermost is named. Where the example runs in train mode, the graph
    there must not tell otherwise.

    Args:
        model: Left as it was.
        example: As of :func:`fedkl.lock`.

    Raises:
        LockError: The model does not run on the example.
    """
    made, passed, heard = _passed(model, example, "eval")
    names: dict[Passed, str] = {}
    for name, value in made:
        if value in passed:
            # A module's hook runs behind those of what is in it.
            names.pop(value, None)
            names[value] = name
    try:
        made, passed, _ = _passed(model, example, "train", heard)
    except LockError:
        made = []
    meant = {name for name, value in made if value in passed}
    other = {name for name, _ in made} - meant
    return [name for name in dict.fromkeys(names.values()) if name not in other]


def _passed(
    model: nn.Module, example: Any, mode: str, heard: Collection[int] | None = None
) -> tuple[list[tuple[str, Passed]], set[Passed], set[int]]:
    """What modules put out, what of it is on every way, and which tensors of the example matter.

    ``heard``: those that are to be looked at; a loss in train mode hears of targets as well.
    """
    made: list[tuple[str, Passed]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                made.append((name, (output.grad_fn, output.output_nr)))

        return hook

    with sources_watched(model, example) as (given, sources):
        count = len(sources)
        # Behind the hooks that make leaves of what indices are looked up as.
        handles = [m.register_forward_hook(watch(n)) for n, m in hookable(model) if n]
        try:
            with restored(model), torch.enable_grad():
                model.train(mode == "train")
                outputs = [t for t in _run(model, given, mode) if t.requires_grad]
                total = sum((_probe(t) for t in outputs), torch.zeros(()))
        finally:
            for handle in handles:
                handle.remove()
        wanted = [t for i, t in enumerate(sources) if heard is None or i >= count or i in heard]
        order = _inputs_first(total.grad_fn, {id(t) for t in wanted})
        found = {id(getattr(node, "variable", None)) for node in order}
        met = {i for i, t in enumerate(sources[:count]) if id(t) in found}
        return made, set(_on_every_way(order)), met


def _on_every_way(order: list[Node]) -> Iterator[Passed]:
    """What every way through ``order``, from its beginning to its end, passes."""
    place = {node: i for i, node in enumerate(order)}
    # How many edges begin and end to leap over each place; sources lie before all of them.
    leaps = [0] * (len(order) + 1)
    # Of what an operation puts out, a half of a tensor say, those that are taken.
    taken: list[set[int]] = [set() for _ in order]
    for i, node in enumerate(order):
        made_of = [(place[n], number) for n, number in node.next_functions if n in place]
        for where, number in made_of:
            taken[where].add(number)
        leaps[min((where for where, _ in made_of), default=-1) + 1] += 1
        leaps[i] -= 1
    over = 0
    for i, node in enumerate(order):
        over += leaps[i]
        if over == 0 and len(taken[i]) == 1:
            yield node, min(taken[i])


def _inputs_first(root: Node, wanted: set[int]) -> list[Node]:
    """What lies between ``root`` and the leaves ``wanted``, each behind what it is made of."""
    found: dict[Node, bool] = {}
    order: list[Node] = []
    stack = [(root, False)] if root is not None else []
    while stack:
        node, ready = stack.pop()
        if not ready and node not in found:
            found[node] = id(getattr(node, "variable", None)) in wanted
            stack.append((node, True))
            stack += [(n, False) for n, _ in node.next_functions if n is not None]
        elif ready:
            found[node] |= any(found.get(n, False) for n, _ in node.next_functions)
            if found[node]:
                order.append(node)
    return order


def warn_of_shortcuts(model: nn.Module, what: Plan, example: Any) -> None:
    """Warns if a pad that was just installed stands where the argument for it fails.

    Warns:
        ShortcutWarning: Nothing secret lies before its first lock, or something goes around it.
    """
    first = what.targets[0]
    if not has_weights(model, what.stem):
        warnings.warn(
            f"nothing secret but the pad lies before the first lock, on {site_name(first)}: it "
            "stands on the input itself, and a pad of a known law alone hides that from nobody who "
            "sees what the next layer gets. Lock behind the first layer that has weights "
            "(layers=… or behind=…).",
            ShortcutWarning,
            stacklevel=4,
        )
    if passes_by(model, first.name, example):
        warnings.warn(
            f"something of the input passes the first lock, on {site_name(first)}, by: a shortcut, "
            "a second branch or a residual stream goes around it, and what takes that way is not "
            f"hidden. Lock where all ways meet ({_remedy(model, example)}), or expect of this pad "
            "that it keeps others from using the model, not that it hides images (docs/theory.md, "
            "shortcuts).",
            ShortcutWarning,
            stacklevel=4,
        )


def _remedy(locked: nn.Module, example: Any) -> str:
    """The first module behind weights where all ways meet."""
    unknown = "behind=…, a module that all of them pass"
    try:
        model = deepcopy(unwrap(locked))
    except Exception:
        return unknown  # locked in place because torch cannot copy it
    remove(model)
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    for name in meeting_points(model, example)[:_TRIED]:
        try:
            check_behind(model, name, traced=True)
            room_behind(model, example, name, trace(model, example, name))
        except LockError:
            continue
        stem = stem_of(model, example, name)
        behind_all = has_weights(model, stem) and parameters - {*stem}
        # A graph does not know of what goes around without one.
        if behind_all and not passes_by(model, name, example):
            return f"behind={name!r}"
    return unknown
