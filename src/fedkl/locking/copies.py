"""Whether what would be sent follows private weights, as a teacher kept inside a model does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fedkl.errors import LockError
from fedkl.locking.check import _run, nothing_zero, restored, weights_kept
from fedkl.locking.split import split

# Added to every private weight: of a slow average a thousandth of a thousandth still shows.
_FAR: Final = 100.0

Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


def refuse_copies(model: nn.Module, sites: Iterable[str], example: Any) -> None:
    """Raises if a run in train mode writes private weights into tensors that would be sent.

    With the outputs of all locks played back, a run with other private weights has to leave the
    same behind in what is shared. Buffers that hear of the example, or of the features behind a
    lock, are statistics and no copies. What is written outside of the model's forward, or not in
    every run, does not show.

    Args:
        model: Locked; is left as it was.
        sites: Names of the modules whose outputs the locks made.
        example: As of :func:`fedkl.lock`.

    Raises:
        LockError: Something shared follows private weights.
    """
    parts = split(model)
    private = [p for p in parts.private.values() if isinstance(p, nn.Parameter)]
    private = [p for p in private if p.is_floating_point() or p.is_complex()]
    if not private:
        return
    ids = {id(t) for t in parts.shared.values()}
    shared = {n: t for n, t in model.state_dict(keep_vars=True).items() if id(t) in ids}
    played: list[Any] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        played.append(_copied(output))

    def replay(of: list[Any]) -> Hook:
        left = iter(of)
        return lambda module, args, output: _copied(next(left))

    def run(given: Any, hook: Hook, change: float = 0.0) -> dict[str, Tensor]:
        return _left_by(model, {*sites}, given, hook, [*shared], private, change)

    with nothing_zero(model):
        try:
            before = run(example, keep)
            follow = _apart(before, run(example, replay(played), _FAR))
            if any(not isinstance(shared[name], nn.Parameter) for name in follow):
                hear = _apart(before, run(_other(example), replay(_other(played))))
                follow = [n for n in follow if isinstance(shared[n], nn.Parameter) or n not in hear]
        except LockError:
            return  # values decide what runs
    if follow:
        raise LockError(
            f"{', '.join(follow[:4])} follow{'s' * (len(follow) == 1)} the weights of private "
            "layers while the model runs (a moving average, a teacher), and would be sent. Keep "
            "such copies outside of the model that is locked."
        )


def _left_by(
    model: nn.Module,
    sites: set[str],
    given: Any,
    hook: Hook,
    names: list[str],
    private: list[nn.Parameter],
    change: float,
) -> dict[str, Tensor]:
    """The named tensors as a run in train mode leaves them, ``change`` added to private weights."""
    handles = [model.get_submodule(name).register_forward_hook(hook) for name in sites]
    try:
        with restored(model), weights_kept(model), torch.enable_grad():
            with torch.no_grad():
                for p in private:
                    p.add_(change)
            _run(model.train(), given, "train")
            state = model.state_dict()
            return {name: state[name].clone() for name in names}
    finally:
        for handle in handles:
            handle.remove()


def _apart(ones: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    return [
        name
        for name, one in ones.items()
        if one.shape != others[name].shape
        or not (torch.equal(one, others[name]) or _close(one, others[name]))
    ]


def _close(one: Tensor, other: Tensor) -> bool:
    number = one.is_floating_point() or one.is_complex()
    return number and torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)


def _copied(value: Any) -> Any:
    """A copy of its own, for layers that write into their input."""
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, value)


def _other(value: Any) -> Any:
    """Other numbers of the same shapes, with another mean; integers in another order."""

    def changed(v: Any) -> Any:
        if not isinstance(v, Tensor) or v.dtype == torch.bool:
            return v
        rolled = v.flatten().roll(1).view_as(v)
        return 0.5 * rolled + 0.1 if v.is_floating_point() or v.is_complex() else rolled

    return tree_map(changed, value)
