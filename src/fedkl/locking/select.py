"""Which sites a request such as ``layers="first"`` or ``layers=r"layer1\\..*"`` means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from fedkl.errors import LockError, unknown
from fedkl.locking.survey import Trace, is_norm, kind_of, refusal

Layers = str | Sequence[str] | re.Pattern[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Target:
    """One place to lock: a norm, or a layer behind (or before) which one is inserted first."""

    name: str
    insert: bool
    before: bool = False


def select(
    model: nn.Module, layers: Layers, order: Trace, *, traced: bool, behind: str | None = None
) -> list[Target]:
    """The targets of ``layers``, in order of execution, each module once.

    ``first``: the first norm, convolution or linear layer that runs; a layer stands for the norm
    right behind it, or has one inserted. ``all``: every norm, and the first layer if it has none;
    in a network without norms every convolution, or else every linear layer but the last.
    ``behind`` a module: what stands there, and of ``layers`` what runs later.

    Raises:
        LockError: Nothing is selected, or something selected cannot carry a lock (each reason).
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if not (isinstance(layers, str | re.Pattern | Iterable) or callable(layers)):
        raise LockError(
            f"layers must be 'first', 'all', a name, names, a regular expression or a function of "
            f"(name, module), got {type(layers).__name__}."
        )
    if behind is not None and layers == "first":
        names = []
    elif layers == "first":
        if not traced:
            raise LockError(
                "layers='first' means the first layer that runs, which takes an example: "
                "pass example=one input batch, or name the layer."
            )
        names = _first(modules, order)
    elif layers == "all":
        names = _all(modules, order, traced=traced)
    else:
        names = _asked(modules, layers, order)
    if behind is not None:
        names = _after(names, behind, layers, modules, order)
    targets = _targets(modules, names, order, behind)
    if not traced:
        targets = _known_without_running(modules, layers, targets)
    if not targets:
        raise LockError(_nothing(modules, layers))
    return targets


def _after(
    names: list[str], behind: str, layers: Layers, modules: dict[str, nn.Module], order: Trace
) -> list[str]:
    """Those of ``names`` that run when the module ``behind`` has run."""
    if order.before is None:
        raise LockError(
            f"cannot lock behind {behind}, which is not called on this example; name a module that "
            "is."
        )
    ran = {id(modules[n]) for n in order.before}  # the order has one name of each alone
    after = [n for n in names if id(modules[n]) not in ran]
    listed = isinstance(layers, str | Iterable) and layers not in ("first", "all")
    early = [n for n in names if id(modules[n]) in ran and n != behind]
    if listed and early and not after:
        raise LockError(
            f"nothing of layers={layers!r} runs behind {behind}, but {', '.join(early[:4])} before "
            "it does; name later layers, layers='all' or layers='first'."
        )
    return after


def _free(modules: dict[str, nn.Module], order: Trace) -> list[str]:
    ran = [*order.order, *(n for n in modules if n not in order.order)]
    return [n for n in ran if kind_of(modules[n]) != "other" and refusal(modules[n]) is None]


def _first(modules: dict[str, nn.Module], order: Trace) -> list[str]:
    return [n for n in order.order if refusal(modules[n]) is None][:1]


def _all(modules: dict[str, nn.Module], order: Trace, *, traced: bool) -> list[str]:
    free = _free(modules, order)
    norms = [n for n in free if is_norm(modules[n])]
    if norms:
        first = _first(modules, order) if traced else []
        return [*first, *norms]
    convolutions = [n for n in free if kind_of(modules[n]) == "convolution"]
    # The last linear layer is the head: a norm behind it would normalize the logits.
    return convolutions or free[:-1]


def _asked(modules: dict[str, nn.Module], layers: Layers, order: Trace) -> list[str]:
    if isinstance(layers, str) and layers in modules:
        chosen = [layers]
    elif isinstance(layers, str | re.Pattern):
        pattern = _pattern(layers)
        chosen = [
            n for n in modules if n and pattern.fullmatch(n) and kind_of(modules[n]) != "other"
        ]
        if not chosen and isinstance(layers, str) and re.fullmatch(r"[\w.]+", layers):
            raise LockError(unknown("layer", layers, [n for n in modules if n]))
    elif callable(layers):
        chosen = [n for n in modules if kind_of(modules[n]) != "other" and layers(n, modules[n])]
    else:
        chosen = list(layers)
        for name in chosen:
            if not isinstance(name, str):
                raise LockError(
                    f"layers are named by text, as in model.named_modules(), got {name!r:.60} "
                    f"({type(name).__name__})."
                )
            if name not in modules:
                raise LockError(unknown("layer", name, [n for n in modules if n]))
    refused = {n: refusal(modules[n]) for n in chosen}
    problems = [f"{n or 'the model itself'}: {why}" for n, why in refused.items() if why]
    if problems and any(True for n in chosen if any(True for _ in modules[n].children())):
        problems.append(r"of a container name the layers, or write e.g. layers=r'layer1\..*'")
    if problems:
        raise LockError("cannot lock " + "; ".join(problems) + ".")
    return sorted(chosen, key=lambda n: order.order.index(n) if n in order.order else 10**9)


def _known_without_running(
    modules: dict[str, nn.Module], layers: Layers, targets: list[Target]
) -> list[Target]:
    """A norm inserted in front of the model's own norm would be undone by it: not unseen."""
    inserted = [t.name for t in targets if t.insert]
    if not inserted or not any(is_norm(m) for m in modules.values()):
        return targets
    norms = [t for t in targets if not t.insert]
    if norms and (callable(layers) or isinstance(layers, str | re.Pattern)):
        return norms
    raise LockError(
        f"whether a norm stands right behind {', '.join(inserted[:4])} shows only when the model "
        "runs: pass example=one input batch, or name the norm itself."
    )


def _pattern(layers: str | re.Pattern[str]) -> re.Pattern[str]:
    try:
        return re.compile(layers)
    except re.error as error:
        raise LockError(
            f"layers={layers!r} is neither a module's name nor a regular expression: {error}."
        ) from error


def _targets(
    modules: dict[str, nn.Module], names: list[str], order: Trace, behind: str | None
) -> list[Target]:
    targets, seen = list[Target](), set[int]()
    # A norm under two parents has two names; its lock goes by the first.
    first = {id(module): name for name, module in reversed(modules.items())}
    if behind is not None:
        seen.add(id(modules[behind]))
        targets.append(Target(first[id(modules[behind])], insert=not is_norm(modules[behind])))
    for name in names:
        norm = order.norm_behind.get(name)
        if not is_norm(modules[name]) and norm and refusal(modules[norm]) is None:
            name = norm
        if id(modules[name]) not in seen:
            seen.add(id(modules[name]))
            name = first[id(modules[name])]
            targets.append(Target(name, insert=not is_norm(modules[name])))
    return targets


def _nothing(modules: dict[str, nn.Module], layers: Layers) -> str:
    reasons = sorted(
        {
            f"{type(m).__name__} ({n or 'the model itself'}): {why}"
            for n, m in modules.items()
            if kind_of(m) != "other" or any(True for _ in m.parameters(False))
            if (why := refusal(m))
        }
    )
    heads = [n for n, m in modules.items() if kind_of(m) == "linear" and not refusal(m)]
    if layers == "all" and heads:
        head = f"linear layer, {heads[0]}," if heads[0] else "layer"
        reasons = [*reasons[:3], f"a norm behind its only {head} would normalize the logits"]
    listed = "; ".join(reasons[:4]) or "it has no norm, convolution or linear layer"
    lookups = (n for n, m in modules.items() if n and isinstance(m, nn.Embedding | nn.EmbeddingBag))
    remedy = next((f" Put a norm behind {n}: behind={n!r}, with an example." for n in lookups), "")
    return (
        f"nothing to lock for layers={layers!r}: {listed}.{remedy} "
        "fedkl.lockable(model) lists every module and why."
    )
