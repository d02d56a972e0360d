"""What a model has that can carry a lock, and in which order it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from fedkl.errors import LockError
from fedkl.locking.insertion import CONVOLUTIONS, NormAfter
from fedkl.locking.sites import LockedNorm, affine_shape
from fedkl.rng import borrowed, derive

NORMS: Final[dict[type[nn.Module], str]] = {
    _BatchNorm: "batch norm",
    _InstanceNorm: "instance norm",
    nn.LayerNorm: "layer norm",
    nn.GroupNorm: "group norm",
    nn.RMSNorm: "RMS norm",
}
LAYERS: Final[dict[type[nn.Module], str]] = {
    **dict.fromkeys(CONVOLUTIONS, "convolution"),
    nn.Linear: "linear",
}
# A norm over C×H×W has one γ per position; a dense map from the key to it would not fit.
MAX_FEATURES: Final = 65_536

_REFUSED: Final[dict[type[nn.Module], str]] = {
    nn.RNNBase: "a recurrent layer has no norm of its own; lock before (behind=…) or after it",
    nn.RNNCellBase: "a recurrent cell has no norm of its own; lock before (behind=…) or after it",
    nn.MultiheadAttention: "attention reads its weights directly; lock the norm next to it",
    nn.LocalResponseNorm: "has no scale and shift",
    nn.CrossMapLRN2d: "has no scale and shift",
    nn.Embedding: "looks rows up, which is no layer to lock; put a norm behind it (behind=…)",
    nn.EmbeddingBag: "looks rows up, which is no layer to lock; put a norm behind it (behind=…)",
    nn.Bilinear: "not supported; lock the layer after it",
}


@dataclass(frozen=True)
class Lockable:
    """One row of :func:`lockable`: a module with tensors of its own, and what can be done.

    Attributes:
        name: Dotted name in the model, "" for the model itself.
        module: Class name.
        kind: ``batch norm``, ``convolution``, … or ``other``.
        lockable: Whether a lock can stand here.
        reason: Why not, or how the lock would stand.
        features: Number of scales a channel lock would compute here; 0 if not lockable.
        added_share: Lock parameters (two maps, key of 1024) over the model's parameters.
    """

    name: str
    module: str
    kind: str
    lockable: bool
    reason: str
    features: int
    added_share: float


def kind_of(module: nn.Module) -> str:
    """``batch norm``, ``layer norm``, …, ``convolution``, ``linear`` or ``other``."""
    for table in (NORMS, LAYERS):
        for base, kind in table.items():
            if isinstance(module, base):
                return kind
    return "other"


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a norm that a lock could stand on."""
    return isinstance(module, tuple(NORMS))


def refusal(module: nn.Module) -> str | None:
    """Why ``module`` cannot carry a lock; None if it can."""
    if isinstance(module, LockedNorm | NormAfter):
        return "already locked; unlock the model first"
    if isinstance(module, LazyModuleMixin) and any(
        nn.parameter.is_lazy(p) for p in [*module.parameters(False), *module.buffers(False)]
    ):
        return "lazy and not yet initialized; run the model once before locking"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted; lock the model before torch.jit.script"
    if parametrize.is_parametrized(module) or _weight_normed(module):
        return "its weights are parametrized; remove the parametrization first"
    for base, reason in _REFUSED.items():
        if isinstance(module, base):
            return reason
    if type(module).__name__.startswith("FrozenBatchNorm"):
        return "frozen: its affine and statistics are constants; use an ordinary batch norm"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "inside attention, which reads its weight without calling it"
    if kind_of(module) == "other":
        return "no scale and shift that a lock could take over"
    if is_norm(module) and math.prod(affine_shape(module)) > MAX_FEATURES:
        return f"more than {MAX_FEATURES} scales; a dense map from the key would not fit"
    return None


def _weight_normed(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return any(type(hook).__name__ in ("WeightNorm", "SpectralNorm") for hook in hooks)


def features_of(module: nn.Module) -> int:
    """Number of channels a lock on ``module`` scales."""
    if is_norm(module):
        return math.prod(affine_shape(module))
    value = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    assert isinstance(value, int)
    return value


def hookable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module that takes hooks, which scripted ones do not."""
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield name, module


def lockable(model: nn.Module) -> list[Lockable]:
    """What can be locked in ``model``, and what not and why.

    Lists every module that is a norm, a convolution, a linear layer or holds tensors of its own.

    Raises:
        LockError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise LockError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    total = max(1, sum(p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p)))
    rows = []
    for name, module in model.named_modules():
        own = [*module.parameters(False), *module.buffers(False)]
        kind = kind_of(module)
        if not own and kind == "other" and not isinstance(module, tuple(_REFUSED)):
            continue
        reason = refusal(module)
        features = 0 if reason else features_of(module)
        how = "takes over its scale and shift" if is_norm(module) else "a norm is inserted behind"
        rows.append(
            Lockable(
                name=name,
                module=type(module).__name__,
                kind=kind,
                lockable=reason is None,
                reason=reason or how,
                features=features,
                added_share=2 * 1024 * features / total,
            )
        )
    return rows


def call(model: nn.Module, example: Any) -> Any:
    """Calls ``model`` on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)


def does_not_run(model: nn.Module, example: Any, error: Exception) -> LockError:
    """The error of an example on which ``model`` failed with ``error``."""
    sizes = [tuple(t.shape) for t in tree_leaves(example) if isinstance(t, Tensor)]
    got = type(example).__name__ + (f" of {', '.join(map(str, sizes[:4]))}" if sizes else "")
    # PyTorch adds pages on how it got there.
    first = str(error).strip().partition("\n")[0][:300].rstrip(".")
    # All that torch says of dtypes has the word: "scalar type", "Input type", "the same dtype".
    remedy = _of_one_dtype(model, example) if "type" in first else ""
    return LockError(
        f"the model does not run on the example ({got}): {type(error).__name__}: {first}. "
        + (
            remedy
            or "Pass the tensor, tuple of arguments or dict of keyword arguments it takes, "
            "of at least two inputs."
        )
    )


def gradients(
    total: Tensor, values: Sequence[Tensor], *, retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """The gradient of ``total`` by each of ``values``, None where it does not depend on one.

    Raises:
        LockError: The model does not allow that.
    """
    try:
        return torch.autograd.grad(total, values, allow_unused=True, retain_graph=retain_graph)
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0][:300].rstrip(".")
        remedy = (
            "Activation checkpointing of the old kind allows no gradients but those of backward(): "
            "pass use_reentrant=False to torch.utils.checkpoint."
            if "use_reentrant" in first
            else "Mend that, or leave the layers at fault out with layers=…"
        )
        raise LockError(
            f"what a lock does cannot be looked at, for the model's gradients fail: {first}. "
            f"{remedy}"
        ) from error


def _of_one_dtype(model: nn.Module, example: Any) -> str:
    """What to do about an example of another floating dtype than the model's; "" if it is none."""
    given, own = (
        {t.dtype: None for t in tensors if isinstance(t, Tensor) and t.is_floating_point()}
        for tensors in (tree_leaves(example), model.parameters())
    )
    if not given or not own or given.keys() & own.keys():
        return ""
    ours, theirs = next(iter(given)), next(iter(own))
    return (
        f"The example is {ours}, the model's parameters {theirs}; give both one dtype: "
        f"example.to({theirs}) or model.to({ours})."
    )


@dataclass(frozen=True)
class Trace:
    """Order of execution on an example.

    Attributes:
        order: Norms, convolutions and linear layers, each at its first call.
        norm_behind: The norm right behind a layer.
        before: Of ``order`` those that had run when the module asked for had; None if it never
            runs, or none was asked for.
        last: The last module with parameters of its own that had, of any kind.
    """

    order: tuple[str, ...]
    norm_behind: Mapping[str, str]
    before: tuple[str, ...] | None = None
    last: str | None = None


class _Tracer:
    """Follows each layer's output through parameter-free modules to the norm that takes it."""

    def __init__(self, model: nn.Module, mark: str | None) -> None:
        self.order: list[str] = []
        self.behind: dict[str, str] = {}
        self.before: tuple[str, ...] | None = None
        self.last: str | None = None
        self.handles = [
            module.register_forward_hook(self._hook(name, module))
            for name, module in hookable(model)
            if not any(True for _ in module.children())
        ]
        if mark is not None:
            # Behind the hooks above: of a layer of its own the mark finds it in the order.
            self.handles.append(model.get_submodule(mark).register_forward_hook(self._mark))

    def _mark(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.before = tuple(self.order) if self.before is None else self.before

    def _hook(self, name: str, module: nn.Module) -> Any:
        known = kind_of(module) != "other"
        passes = not any(True for _ in module.parameters(False))

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            origin = getattr(args[0], "_fedkl_origin", None) if args else None
            if known and name not in self.order:
                self.order.append(name)
            if not passes and self.before is None:
                self.last = name
            if not isinstance(output, Tensor):
                return
            if is_norm(module):
                if origin is not None:
                    self.behind.setdefault(origin, name)
                output._fedkl_origin = None  # type: ignore[attr-defined]
            elif known:
                output._fedkl_origin = name  # type: ignore[attr-defined]
            elif passes and origin is not None:
                output._fedkl_origin = origin  # type: ignore[attr-defined]

        return hook

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def trace(model: nn.Module, example: Any, mark: str | None = None) -> Trace:
    """Runs ``example`` once and records which norms, convolutions and linear layers ran.

    ``mark``: also which of them before the module of that name had.

    Runs in eval mode with gradients on: no statistics move, and fused inference paths, which
    skip modules, stay out of the way.

    Raises:
        LockError: The model does not run on ``example``.
    """
    modes = {module: module.training for module in model.modules()}
    tracer = _Tracer(model, mark)
    model.eval()
    try:
        with torch.enable_grad(), borrowed(derive(0, "trace")):
            call(model, example)
    except Exception as error:
        raise does_not_run(model, example, error) from error
    finally:
        tracer.close()
        for module, mode in modes.items():
            module.training = mode
    return Trace(tuple(tracer.order), dict(tracer.behind), tracer.before, tracer.last)


def registered(model: nn.Module) -> Trace:
    """Stand-in for :func:`trace` without an example: the order of registration."""
    return Trace(tuple(n for n, m in model.named_modules() if kind_of(m) != "other"), {})
