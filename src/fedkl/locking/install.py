"""Putting locks into a model and taking them out again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedkl.errors import ExtraStateWarning, LockError
from fedkl.key import Key
from fedkl.locking.batch import check_batch_axis
from fedkl.locking.behind import is_layer, room_behind
from fedkl.locking.ends import head_of, heads_of
from fedkl.locking.insertion import (
    INPUT_NAME,
    INSERTED_NAME,
    NormAfter,
    NormBefore,
    Room,
    insert_norm,
    new_norm,
    remove_norm,
    room_at,
)
from fedkl.locking.pad import OpenPad, Pad
from fedkl.locking.scheme import Scheme, Site
from fedkl.locking.select import Target
from fedkl.locking.sites import (
    LockedNorm,
    affine_shape,
    current_affine,
    guard,
    lock_norm,
    release,
    unlock_norm,
)
from fedkl.locking.sizes import (
    Size,
    activation_sizes,
    feature_axis,
    has_weights,
    stem_of,
)
from fedkl.locking.sources import AffineSource
from fedkl.locking.spec import LockSpec, SiteSpec
from fedkl.locking.split import forget, record, split
from fedkl.locking.stem import draw_private, give_back, make_private, owned
from fedkl.locking.survey import Trace


@dataclass(frozen=True)
class Plan:
    """Everything to install, decided before the model is changed.

    Attributes:
        targets: Where locks stand, in order of execution.
        sizes: Of positional schemes the size of every lock, by the target's site name.
        private: Names of further private tensors: stem and head.
        stem: Those of the stem alone; empty if it is not known.
        rooms: What the norm behind a module that is no layer is for, by the module's name.
    """

    targets: Sequence[Target]
    sizes: Mapping[str, Size] = field(default_factory=dict)
    private: tuple[str, ...] = ()
    stem: tuple[str, ...] = ()
    rooms: Mapping[str, Room] = field(default_factory=dict)


def plan(
    model: nn.Module,
    scheme: Scheme,
    targets: Sequence[Target],
    ran: Trace,
    example: Any,
    *,
    every: bool = False,
) -> Plan:
    """Sizes of the locks and names of the private layers, from a run on ``example``.

    ``every``: the targets are all that there are, so that a pad may leave those out before which
    there is nothing secret.

    Raises:
        LockError: A norm runs at two sizes or not at all, its batch is not axis 0, or there is no
            head.
    """
    rooms = {
        t.name: room_behind(model, example, t.name, ran)
        for t in targets
        if t.insert and not is_layer(model.get_submodule(t.name))
    }
    if not isinstance(scheme, Pad | OpenPad):
        return Plan(targets, rooms=rooms)
    outputs = activation_sizes(model, example, [t.name for t in targets])
    check_batch_axis(model, example, outputs)
    if every and scheme.stem:
        targets = _behind_weights(model, example, targets)
    tokens = {site_name(t) for t in targets if _of_tokens(model, t, rooms)}
    if scheme.max_length is not None and not tokens:
        raise LockError(
            f"max_length={scheme.max_length} is for tokens (T, D), and no lock of this model "
            "stands on any; leave it out."
        )
    sizes = {site_name(t): outputs[t.name] for t in targets}
    sizes |= {name: _longer(sizes[name], scheme.max_length) for name in tokens}
    private: list[str] = []
    if scheme.stem:
        private += stem_of(model, example, targets[0].name)
    stem, order = tuple(private), ran.order
    taken = _affines_of(model, targets)
    if scheme.head is not False:
        private += _head(model, scheme, ran, example, {*private, *taken})
    if scheme.lock_head_input:
        head = head_of(order, model)
        target = Target(head, insert=True, before=True)
        size = activation_sizes(model, example, [head], inputs=True)[head]
        targets = [*targets, target]
        sizes[site_name(target)] = _longer(size, scheme.max_length)
    return Plan(targets, sizes, tuple(n for n in private if n not in taken), stem, rooms)


def _behind_weights(model: nn.Module, example: Any, targets: Sequence[Target]) -> Sequence[Target]:
    """Without the first norms that have no weights before them, unless all are such.

    What they normalize is the input itself. They come to lie in the private stem.
    """
    for index, target in enumerate(targets):
        if has_weights(model, stem_of(model, example, target.name)):
            return targets[index:]
    return targets


def _of_tokens(model: nn.Module, target: Target, rooms: Mapping[str, Room]) -> bool:
    """Whether what stands there is normalized over its last axis, whatever lies before."""
    module = model.get_submodule(target.name)
    if target.insert:
        return (rooms[target.name] if target.name in rooms else room_at(module)).rows
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(affine_shape(module)) == 1


def _affines_of(model: nn.Module, targets: Sequence[Target]) -> set[str]:
    """Names of γ and β of the norms that will be locked, under every name a norm has."""
    norms = {id(model.get_submodule(t.name)) for t in targets if not t.insert}
    return {
        f"{name}.{n}".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in norms
        for n in ("weight", "bias")
    }


def _head(
    model: nn.Module, scheme: Pad | OpenPad, ran: Trace, example: Any, taken: Set[str]
) -> list[str]:
    """Names of the parameters of the head and of further output layers, if not taken already.

    Empty if nobody asked for a private head and it, with what is taken, is all there is to share.
    """
    named = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    try:
        heads = {*heads_of(model, ran.order, example, guess=not scheme.head)}
    except LockError:
        if scheme.head:
            raise
        return []
    found = [n for n in named if n in heads and n not in taken]
    rest = {*named} - taken - {*found}
    return found if rest or scheme.head else []


def _longer(size: Size, rows: int | None) -> Size:
    """The size with room for ``rows`` tokens, if it is one of tokens."""
    return (max(rows, size[0]), size[1]) if rows and len(size) == 2 else size


def site_name(target: Target) -> str:
    """Name of the norm that carries the lock of ``target``."""
    if not target.insert:
        return target.name
    child = INPUT_NAME if target.before else INSERTED_NAME
    return f"{target.name}.{child}" if target.name else child


def target_of(site: SiteSpec) -> Target:
    """Inverse of :func:`site_name`."""
    if not site.inserted:
        return Target(site.name, insert=False)
    before = site.name.rpartition(".")[2] == INPUT_NAME
    child = INPUT_NAME if before else INSERTED_NAME
    return Target(site.name.removesuffix(child).removesuffix("."), insert=True, before=before)


def install(
    model: nn.Module,
    key: Key | None,
    scheme: Scheme,
    what: Plan,
    norm: str,
    share_statistics: bool,
) -> dict[str, AffineSource]:
    """Installs one source per target (in place) and writes the spec down on the model.

    Raises:
        LockError: Nothing would be left to share; the model is then to be given to :func:`remove`.
    """
    make_private(model, what.private)
    sources: dict[str, AffineSource] = {}
    sites, previous = [], None
    for target in what.targets:
        site, room = site_name(target), what.rooms.get(target.name)
        rows = target.insert and _insert(model, target, norm, room)
        module = model.get_submodule(site)
        shape = what.sizes.get(site, affine_shape(module))
        scale, shift = current_affine(module)
        if scheme.positional:
            before = _axes_before(scheme, module, site, shape, rows=rows)
            scale, shift = (_spread_out(t, shape, before) for t in (scale, shift))
        place = Site(name=site, scale=scale, shift=shift, shape=shape, previous=previous)
        source = scheme.source(place, key)
        told = rows and room is not None
        sites.append(SiteSpec(site, type(module).__name__, shape, target.insert, told))
        if source is not None:
            how = {"positional": scheme.positional, "rows": rows}
            lock_norm(module, source, site, statistics_shared=share_statistics, **how)
            source.train(module.training)
            sources[site] = previous = source
    if key is not None and what.private:
        draw_private(model, key)
    model.__dict__["_fedkl_spec"] = LockSpec(
        scheme.name, scheme.settings(), tuple(sites), norm, share_statistics, what.private
    )
    _seal(model, scheme)
    return sources


def check_private(model: nn.Module, what: Plan, example: Any) -> None:
    """Raises unless private layers do in the locked model what made them private before.

    The first lock hears of all the stem; of every further module that owns something private an
    output does.

    Raises:
        LockError: Names the modules that play no part any more.
    """
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    private = {n: n.rpartition(".")[0] for n in what.private if n in parameters}
    before, heard = ({*stem_of(model, example, n)} for n in (what.targets[0].name, ""))
    lost = {owner for n, owner in private.items() if n in what.stem and n not in before}
    rest = {owner for n, owner in private.items() if n not in what.stem}
    lost |= rest - {owner for n, owner in private.items() if n in heard}
    if lost:
        raise LockError(
            f"private layers play no part in the locked model: {', '.join(sorted(lost))}. lock() "
            "exchanges their classes for subclasses, and a forward that asks for a class by "
            "type(layer) is … no longer calls them; let it ask by isinstance."
        )


def _seal(model: nn.Module, scheme: Scheme) -> None:
    """Guards private layers, lets the split know them, and checks that something is shared."""
    for module in model.modules():
        if owned(module):
            guard(module)
    record(model)
    parts = split(model)
    if parts.left_out:
        warnings.warn(
            f"the model has extra state, {', '.join(parts.left_out[:4])}, which is neither shared "
            "nor private state: nobody knows what of it may leave the client. It stays in the "
            "model and its state_dict() and is not sent. Make a buffer of what a global model "
            "needs.",
            ExtraStateWarning,
            stacklevel=4,
        )
    if not scheme.private or any(isinstance(t, nn.Parameter) for t in parts.shared.values()):
        return
    raise LockError(
        f"with scheme {scheme.name!r} every parameter is private ({', '.join([*parts.private][:4])}"
        "…), and nothing is left to share: the layers are tied to private ones, or there are no "
        "others. Lock fewer or earlier layers (layers=…, behind=…), or set head=False or "
        "stem=False of a pad."
    )


def _insert(model: nn.Module, target: Target, norm: str, room: Room | None) -> bool:
    """Inserts a norm (in place); tells whether its features are on the last axis."""
    module = model.get_submodule(target.name)
    room = room or room_at(module, before=target.before)
    tensors = (t for m in (module, model) for t in m.parameters() if t.is_floating_point())
    like = next(tensors, torch.empty(()))
    new = new_norm(room, norm, like, training=module.training)
    insert_norm(module, new, rows=room.rows, before=target.before)
    return room.rows


def _axes_before(scheme: Scheme, norm: nn.Module, site: str, shape: Size, *, rows: bool) -> int:
    """How many of the axes of ``shape`` come before those of the norm's γ.

    None in torch's own norms of channels, all others in those of rows. In classes of somebody
    else's, such as a layer norm that turns channels to the end and back, this has to be seen, if
    something is learned per channel.
    """
    missing = len(shape) - len(affine_shape(norm))
    own = rows or type(norm).__module__.startswith("torch.nn.")
    told = own or len(affine_shape(norm)) > 1
    if not told and isinstance(scheme, Pad) and scheme.learned == "channel":
        return feature_axis(norm, site, shape)
    return missing if rows or isinstance(norm, nn.LayerNorm | nn.RMSNorm) else 0


def _spread_out(affine: Tensor, shape: Size, before: int) -> Tensor:
    """γ or β of a norm so that it broadcasts over ``shape``, behind so many of its axes."""
    missing = len(shape) - affine.ndim
    return affine.reshape((1,) * before + tuple(affine.shape) + (1,) * (missing - before))


def remove(model: nn.Module) -> None:
    """Takes every lock off ``model`` (in place), also off one that was locked only in part."""
    for module in list(model.modules()):
        release(module)
        if isinstance(module, LockedNorm):
            unlock_norm(module)
        # A norm inserted is thrown away: no need to unlock that, a descendant.
        if isinstance(module, NormBefore):
            remove_norm(module)
        if isinstance(module, NormAfter):
            remove_norm(module)
        give_back(module)
        module.__dict__.pop("_fedkl_spec", None)
        forget(module)
