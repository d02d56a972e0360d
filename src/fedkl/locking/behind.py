"""A first lock behind any module: what may carry a norm there, and of which kind."""

from __future__ import annotations

import re
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedkl.errors import LockError, unknown
from fedkl.locking.check import restored
from fedkl.locking.insertion import INSERTED_NAME, Room, is_sequence
from fedkl.locking.sites import Swapped, check_free
from fedkl.locking.sizes import activation_sizes
from fedkl.locking.spec import SiteSpec
from fedkl.locking.survey import LAYERS, Trace, call, features_of, kind_of, refusal
from fedkl.rng import borrowed, derive

_AXES: Final = 3  # of positions, in what torch has batch and instance norms for
# Modules whose features are the last axis of what they put out, and the name of their number.
_LAST_AXIS: Final[dict[type[nn.Module], str]] = {
    nn.Linear: "out_features",
    nn.Embedding: "embedding_dim",
    nn.MultiheadAttention: "embed_dim",
    nn.RNNBase: "hidden_size",
    nn.LayerNorm: "normalized_shape",
    nn.RMSNorm: "normalized_shape",
}


def check_behind(model: nn.Module, behind: str | None, *, traced: bool) -> None:
    """Raises unless ``behind`` names a part of ``model`` and there is an example.

    Raises:
        LockError: It does not, or there is none.
    """
    if behind is None:
        return
    if not isinstance(behind, str):
        raise LockError(f"behind must be a module's name, got {type(behind).__name__}.")
    names = [n for n, _ in model.named_modules(remove_duplicate=False) if n]
    if behind not in names:
        raise LockError(unknown("module", behind, names))
    if not traced:
        raise LockError(
            "a lock behind a module takes an example, which shows what runs after it: pass "
            "example=one input batch."
        )
    if why := refusal_behind(model.get_submodule(behind)):
        raise LockError(f"cannot lock behind {behind}: {why}.")


def refusal_behind(module: nn.Module) -> str | None:
    """Why no norm can be put behind ``module``, or ``module`` cannot be locked if it is one."""
    if kind_of(module) != "other" or isinstance(module, torch.jit.ScriptModule | Swapped):
        return refusal(module)
    return None


def room_behind(model: nn.Module, example: Any, name: str, ran: Trace) -> Room:
    """What a norm behind the module ``name`` would normalize.

    Which axis has the features is told by the last layer that has run by then, and by sizes.

    Raises:
        LockError: No norm can stand there: it puts out something else than one tensor of floating
            point, at two sizes, or runs its children in a way of its own; or nothing tells.
    """
    _check_output(model, example, name)
    size = activation_sizes(model, example, [name])[name]
    rows = len(size) == 1 or _features_last(name, size, model, ran.last)
    return Room(size[-1] if rows else size[0], 1 if rows else max(1, len(size) - 1), rows)


def _features_last(name: str, size: tuple[int, ...], model: nn.Module, last: str | None) -> bool:
    module = None if last is None else model.get_submodule(last)
    width = next((w for kind, w in _LAST_AXIS.items() if isinstance(module, kind)), None)
    features = None
    if module is not None and width is not None:
        value = getattr(module, width)
        features = value[-1] if isinstance(value, tuple) else value
    elif module is not None and kind_of(module) != "other":
        features = features_of(module)
    if features is None and len(size) == 2:
        raise LockError(
            f"cannot lock behind {name}: nothing tells whether its output {size} is (tokens, "
            "features) or (features, positions), for the last layer before is none of torch's "
            "own; put a norm of your own there and name it."
        )
    first, at_end = size[0] == features, size[-1] == features
    return at_end if first != at_end else width is not None


def _check_output(model: nn.Module, example: Any, name: str) -> None:
    """Raises unless ``name`` puts out one tensor and would not run the norm itself."""
    module = model.get_submodule(name)
    check_free(module, INSERTED_NAME)
    witness, outputs, runs = nn.Identity(), list[Any](), list[Any]()
    failed = False
    handles = [
        module.register_forward_hook(lambda m, args, output: outputs.append(output)),
        witness.register_forward_hook(lambda m, args, output: runs.append(output)),
    ]
    module.add_module(INSERTED_NAME, witness)
    try:
        with restored(model), torch.no_grad(), borrowed(derive(0, "behind")):
            model.eval()
            call(model, example)
    except Exception:
        failed = True  # without the witness it has run before
    finally:
        del module._modules[INSERTED_NAME]
        for handle in handles:
            handle.remove()
    kind = type(module).__name__
    if failed or (runs and not is_sequence(type(module))):
        raise LockError(
            f"cannot lock behind {name} ({kind}): it goes over its children by itself and would "
            "take the norm for one of them; name a module before or after it."
        )
    if not outputs:
        raise LockError(
            f"cannot lock behind {name} ({kind}), which is not called on this example; name a "
            "module that is."
        )
    for output in outputs:
        leaves = tree_leaves(output)
        if len(leaves) != 1 or not isinstance(output, Tensor) or not output.is_floating_point():
            raise LockError(
                f"cannot lock behind {name} ({kind}): it puts out {type(output).__name__}, and a "
                "norm takes one tensor of floating point; name a module that makes one."
            )
        if output.ndim < 2:
            raise LockError(f"cannot lock behind {name} ({kind}): its output has no features.")


def room_of_site(site: SiteSpec) -> Room:
    """The same of a lock that stands already.

    Raises:
        LockError: A norm of so many axes there is not; specs come from others.
    """
    dims = re.search(r"(\d)d$", site.norm)
    known = int(dims[1]) if dims else max(1, len(site.shape) - 1)
    if not 1 <= known <= _AXES:
        raise LockError(f"the lock spec has a {site.norm} of {known} axes at {site.name}.")
    return Room(site.shape[-1 if site.rows else 0], 1 if site.rows else known, site.rows)


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution or linear layer, which says itself what is behind it."""
    return isinstance(module, tuple(LAYERS))
