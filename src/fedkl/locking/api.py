"""lock, unlock, merge: the verbs of the house."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedkl.errors import ConfigError, LockError, unknown
from fedkl.key import Key
from fedkl.locking.behind import check_behind, is_layer, refusal_behind, room_of_site
from fedkl.locking.check import verify, weights_kept
from fedkl.locking.copies import refuse_copies
from fedkl.locking.holder import copied, is_locked, lock_spec, sources_of, unwrap
from fedkl.locking.insertion import INSERTABLE
from fedkl.locking.install import (
    Plan,
    check_private,
    install,
    plan,
    remove,
    target_of,
)
from fedkl.locking.meeting import warn_of_shortcuts
from fedkl.locking.pad import Pad, PadAffine
from fedkl.locking.scheme import Scheme
from fedkl.locking.schemes import Channel, scheme_of
from fedkl.locking.select import Layers, Target, select
from fedkl.locking.sources import AffineSource, KeyedAffine
from fedkl.locking.spec import LockSpec
from fedkl.locking.survey import refusal, registered, trace


def lock(
    model: nn.Module,
    key: Key | None,
    *,
    scheme: str | Scheme = "channel",
    layers: Layers = "all",
    behind: str | None = None,
    example: Any = None,
    norm: str = "batch",
    inplace: bool = False,
    share_statistics: bool = False,
    group: Key | None = None,
    **settings: Any,
) -> nn.Module:
    """A copy of ``model`` whose norms take scale and shift from ``key`` (arXiv 2305.04095).

    Build the optimizer after locking; :func:`check_optimizer` finds one that was built before.

    The lock's gradients, its optimizer's moments and its trained weights are as secret as the key:
    every gradient of W points along the key vector. ``torch.export`` and ``torch.jit`` write the
    key vector into what they save; export ``merge(model)`` instead.

    Layers that never run are shared, and sent as they are: a teacher that is averaged from the
    model outside of its forward must be kept outside of the model, too.

    Args:
        model: Any module. Stays as it is unless ``inplace``.
        key: The client's key. None only for the keyless schemes. A pad is a function of key, layer
            names and epoch: one key for one model, or the same pad serves twice.
        scheme: A name or a :class:`Scheme`. ``pad`` hides images: one γ and β per position, a
            private stem and head (docs/theory.md says from whom and how long; takes an example).
            ``channel`` and the presets ``paper`` and ``paper-sigmoid`` make the model useless
            without the key; they hide nothing from an attacker who searches γ and β in the update
            of one image. ``norm``, ``fedbn`` and ``open-pad`` are controls without a key. Further
            keyword arguments are the settings of a named scheme (``spread=1.0``).
        layers: ``first`` (executed on ``example``), ``all``, a module's name, a regular
            expression over whole names, a list of names, or ``predicate(name, module)``. Of
            ``all`` a pad leaves out norms of the input itself, which come to lie in its stem.
            A module that is itself called ``first`` or ``all`` is meant by a list, ``["first"]``.
        behind: Name of any module, such as a whole stage or block, behind which the first lock
            stands; a norm is inserted there unless it is one. Of ``layers`` those count that run
            later, none with ``first``. A pad there makes everything before it private. Takes an
            example, and a module that every run calls: one that layer drop leaves out at times
            lets the input around.
        example: A tensor, tuple of arguments or dict of keyword arguments the model runs on.
            With it the lock is verified: in train, eval and no-grad mode every lock must matter.
            Frozen layers that a pad makes private are trained; frozen norms stay so.
        norm: Kind of norm inserted where there is none: ``batch``, ``group`` or ``instance``.
        share_statistics: Whether running statistics of locked norms are shared. They are functions
            of private features; the released code of the paper shares them.
        group: A second key that all clients of a federation have and nobody else: their locks then
            start at the same γ and β, so that what they teach the shared layers adds up. It is as
            worth guarding as a client's key: whoever has it knows where the locks started.

    Returns:
        The locked model; same forward signature.

    Warns:
        ShortcutWarning: Something of the input goes around the first lock of a pad, as in a
            pre-norm transformer or a second branch: the pad does not hide that part. Or that lock
            stands on the input itself, with no private weights before it.
        ExtraStateWarning: Modules have extra state (``get_extra_state``), or hooks add to the state
            dict, which is neither in the shared nor in the private state.

    Raises:
        LockError: Nothing can be locked or nothing would be left to share, a lock or a private
            layer would have no effect, something shared follows private weights as the model
            runs (a moving average of them), the model is locked already, or ``layers`` names
            something that cannot carry a lock. A model locked ``inplace`` is then as it was.
        ConfigError: Unknown scheme, setting or kind of norm.
    """
    value = scheme_of(scheme, **settings)
    model = unwrap(model)
    _check_arguments(model, key, value, layers, example)
    _check_norm(norm)
    if group is not None and not isinstance(group, Key):
        raise LockError(f"group must be a fedkl.Key or None, got {type(group).__name__}.")
    locked = model if inplace else copied(model, "Or lock it with inplace=True")
    # A model's own forward may count or cache: it runs on the copy, never on the argument.
    check_behind(locked, behind, traced=example is not None)
    order = registered(locked) if example is None else trace(locked, example, behind)
    targets = select(locked, layers, order, traced=example is not None, behind=behind)
    every = layers == "all" and behind is None
    try:
        with weights_kept(locked):
            what = plan(locked, value, targets, order, example, every=every)
        sources = install(locked, key, value, what, norm, share_statistics)
        if group is not None:
            agree(locked, group)
        if example is not None:
            _try(locked, value, what, sources, example)
    except Exception:
        remove(locked)
        raise
    return locked


def _try(
    locked: nn.Module,
    scheme: Scheme,
    what: Plan,
    sources: Mapping[str, AffineSource],
    example: Any,
) -> None:
    """Raises or warns where on the example a lock does not do what it is for."""
    with weights_kept(locked):
        verify(locked, sources, example)
        refuse_copies(locked, [t.name for t in what.targets], example)
        if what.private:
            check_private(locked, what, example)
        if isinstance(scheme, Pad) and scheme.stem:
            warn_of_shortcuts(locked, what, example)


def lock_like(
    model: nn.Module, key: Key | None, spec: LockSpec, *, inplace: bool = False
) -> nn.Module:
    """Locks ``model`` as ``spec`` says, without an example.

    Raises:
        LockError: As :func:`lock`, or the model is not of the architecture ``spec`` was made for.
        ConfigError: The spec names an unknown scheme, setting or kind of norm.
    """
    if not isinstance(spec, LockSpec):
        raise LockError(
            f"expected a lock spec, got {type(spec).__name__}; pass lock_spec(model) of a locked "
            "model, or LockSpec.from_dict(...) of what to_dict() wrote."
        )
    scheme = spec.scheme_value()
    model = unwrap(model)
    _check_model(model, key, scheme)
    _check_norm(spec.norm)
    if large := [s.name for s in spec.sites if not 0 < math.prod(s.shape) <= _MAX_POSITIONS]:
        raise LockError(f"the lock spec gives {', '.join(large)} a size no lock can have{_FIT}")
    targets = [target_of(site) for site in spec.sites]
    _check_fit(model, spec, targets)
    locked = model if inplace else copied(model, "Or lock it with inplace=True")
    try:
        sizes = {site.name: site.shape for site in spec.sites} if scheme.positional else {}
        rooms = {
            t.name: room_of_site(site)
            for t, site in zip(targets, spec.sites, strict=True)
            if t.insert and not is_layer(locked.get_submodule(t.name))
        }
        what = Plan(targets, sizes, spec.private, rooms=rooms)
        install(locked, key, scheme, what, spec.norm, spec.statistics_shared)
        made = {site.name: site for site in lock_spec(locked).sites}
        if wrong := [s.name for s in spec.sites if made.get(s.name) != s]:
            raise LockError(f"kind or size of {', '.join(wrong)} is not the lock spec's{_FIT}")
    except Exception:
        remove(locked)
        raise
    return locked


def _check_fit(model: nn.Module, spec: LockSpec, targets: Sequence[Target]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    if missing := [t.name for t in targets if t.name not in modules]:
        raise LockError(f"the lock spec names {', '.join(missing)}, which this model lacks{_FIT}")
    reasons = {t.name: refusal_behind if t.insert else refusal for t in targets}
    if refused := {n: why for n, ask in reasons.items() if (why := ask(modules[n]))}:
        raise LockError(f"the lock spec does not fit this model: {refused}{_FIT}")
    known = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    known |= {n for n, _ in model.named_buffers(remove_duplicate=False)}
    if lost := [n for n in spec.private if n not in known]:
        raise LockError(f"the lock spec names {', '.join(lost[:4])}, which is not there{_FIT}")


# A spec comes from somebody else and must not make us allocate at will; no activation has as many.
_MAX_POSITIONS: Final = 2**26
_FIT: Final = "; build the model with the architecture the spec was made for."


def _check_model(model: nn.Module, key: Key | None, scheme: Scheme) -> None:
    if not isinstance(model, nn.Module):
        raise LockError(f"expected a torch.nn.Module to lock, got {type(model).__name__}.")
    if is_locked(model):
        raise LockError("the model is locked already; unlock(model) first.")
    if lazy := [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]:
        raise LockError(
            f"{', '.join(lazy[:4])} has no shape yet, its module is lazy; run the model once "
            "before locking."
        )
    if empty := [n for n, t in model.state_dict(keep_vars=True).items() if _is_meta(t)]:
        raise LockError(
            f"{', '.join(empty[:4])} is on the meta device and has no values; give the model some "
            "first (model.to_empty(device='cpu') and an initialization) and lock it then."
        )
    if scheme.keyed and not isinstance(key, Key):
        raise LockError(
            f"scheme {scheme.name!r} needs a fedkl.Key, got {type(key).__name__}: "
            "pass Key.generate() or Key.load(path)."
        )
    if isinstance(scheme, Pad) and key is not None:
        check_random(key)


def _is_meta(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _check_norm(norm: str) -> None:
    # Also where none is inserted: a name that is not read would hide a mistake.
    if norm not in INSERTABLE:
        raise ConfigError(unknown("norm to insert", str(norm), INSERTABLE))


def check_random(key: Key) -> None:
    """Raises unless ``key`` was drawn at random: a pad is as unpredictable as its key.

    Raises:
        LockError: The key is an imported vector, whose entropy nobody knows.
    """
    if key.kind != "seed":
        raise LockError(
            "a pad takes a random key, got an imported vector, which works with scheme 'channel' "
            "only; use Key.generate()."
        )


def _check_arguments(
    model: nn.Module, key: Key | None, scheme: Scheme, layers: Layers, example: Any
) -> None:
    _check_model(model, key, scheme)
    tensors = [t for t in tree_leaves(example) if isinstance(t, Tensor)]
    if tensors and tensors[0].numel() == 0:
        raise LockError(
            f"the example holds no inputs {tuple(tensors[0].shape)}, and would show nothing of a "
            "lock; pass a batch of two or more."
        )
    for value in tensors:
        # Infinity has its uses, in the masks of attention; NaN in means NaN out, whatever the lock.
        if bool(torch.isnan(value).any()):
            raise LockError(
                "the example holds NaN, and would show nothing of a lock; pass an input the model "
                "is made for."
            )
    chained = isinstance(scheme, Channel) and scheme.chain and layers != "first"
    if example is None and (scheme.needs_example or chained):
        raise LockError(
            f"scheme {scheme.name!r} with these settings needs an example: it depends on the order "
            "of execution or on activation sizes. Pass example=one input batch."
        )


def agree(model: nn.Module, group: Key) -> None:
    """Makes freshly started locks start where ``group`` says, one after the other (in place).

    Raises:
        LockError: Locks of this scheme cannot.
    """
    spec = lock_spec(model)
    scheme = spec.scheme_value()
    if not (isinstance(scheme, Channel) and scheme.takes_group):
        raise LockError(
            f"locks of scheme {spec.scheme!r} with these settings cannot start where a group key "
            "says (it takes a spread, the identity activation and no bias); leave group out."
        )
    sources = sources_of(model)
    for site in spec.sites:
        source = sources[site.name]
        if isinstance(source, KeyedAffine):
            scheme.agree(source, group.stream(f"group/{site.name}"))


def unlock(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A copy of ``model`` without locks: original scale and shift, inserted norms gone.

    What was trained since in the shared tensors stays; private running statistics go back to those
    before locking. Without training in between, the outputs are bit-identical to the model before
    :func:`lock`.

    Raises:
        LockError: The model is not locked, or cannot be copied.
    """
    root = unwrap(model)
    root = root if inplace else copied(root, "Or unlock it with inplace=True")
    lock_spec(root)
    remove(root)
    return root


def set_key(model: nn.Module, key: Key) -> None:
    """Puts another key into a locked model; the lock's weights stay (in place).

    A pad is drawn anew, of the epoch that the private state says; private layers stay.
    This is the thief who got the lock's weights but not the key, and the user with a wrong key.

    Raises:
        LockError: No lock of the model takes a key, ``key`` is none, or it is an imported vector
            and the lock a pad.
        ConfigError: An imported vector has another length than the lock's. Nothing is changed.
    """
    if isinstance(key, Key) and isinstance(lock_spec(model).scheme_value(), Pad):
        check_random(key)
    put_key(model, key)


def put_key(model: nn.Module, key: Key) -> None:
    """As :func:`set_key`, imported vectors into a pad included: guesses of a thief (in place).

    Raises:
        LockError, ConfigError: As :func:`set_key`.
    """
    if not isinstance(key, Key):
        raise LockError(f"expected a fedkl.Key, got {type(key).__name__}.")
    spec = lock_spec(model)
    scheme = spec.scheme_value()
    sources = [m for m in unwrap(model).modules() if isinstance(m, KeyedAffine)]
    if isinstance(scheme, Pad):
        for pad in sources_of(model).values():
            assert isinstance(pad, PadAffine)
            scheme.redraw(pad, key, int(pad.epoch))
        return
    if not sources or not isinstance(scheme, Channel):
        raise LockError(f"scheme {spec.scheme!r} takes no key.")
    vector = key.vector(scheme.length, scheme.law)
    for source in sources:
        source.set_key_vector(vector)


def affines(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """(γ, β) of every lock by site name, detached. Private: for the client's own use."""
    with torch.no_grad():
        return {
            name: (source.scale().clone(), source.shift().clone())
            for name, source in sources_of(model).items()
        }
