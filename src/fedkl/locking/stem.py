"""Private layers: the stem before the first lock, and a private head. Their weights come from the
key, never from weights that others have seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedkl.errors import LockError
from fedkl.key import Key, KeyStream
from fedkl.locking.survey import is_norm, kind_of

_OWNED: Final = "_fedkl_private"


@dataclass(frozen=True)
class Kept:
    """One private tensor of a layer, as it was before locking.

    Attributes:
        name: Its name in the model at that time.
        value: A copy.
        trained: Whether it was to be trained.
        stream: Name of the key stream it is drawn from; None for buffers, and for a tied
            parameter everywhere but in the first place.
    """

    name: str
    value: Tensor
    trained: bool
    stream: str | None

    def __repr__(self) -> str:
        return f"Kept({self.name!r})"


def owned(module: nn.Module) -> dict[str, Kept]:
    """The private tensors that ``module`` itself holds, by their names in it."""
    found: dict[str, Kept] = module.__dict__.get(_OWNED, {})
    return found


def make_private(model: nn.Module, names: Iterable[str]) -> None:
    """Marks the named tensors, and keeps them so that :func:`give_back` can (in place).

    Frozen parameters are thawed: what they had learned goes, and noise that stays is no stem.

    Raises:
        LockError: One is in a scripted module, which cannot be marked.
    """
    # Not every buffer is in the state dict; those that are not never leave the client either.
    state = model.state_dict(keep_vars=True)
    first = {id(p): n for n, p in model.named_parameters()}
    fresh: list[Tensor] = []
    for name in names:
        prefix, _, local = name.rpartition(".")
        if name in state:
            tensor = state[name]
            is_parameter = isinstance(tensor, nn.Parameter)
            stream = name if is_parameter and first[id(tensor)] == name else None
            kept = Kept(name, tensor.detach().clone(), tensor.requires_grad, stream)
            module = model.get_submodule(prefix)
            if isinstance(module, torch.jit.ScriptModule):
                raise LockError(
                    f"{name} would be private, being part of stem or head, and is in a scripted "
                    "module, which cannot be made so; put in the module it was scripted from."
                )
            marks = module.__dict__.setdefault(_OWNED, {})
            # A layer in two places has two names; the first is that of its key stream.
            if local not in marks or stream is not None:
                marks[local] = kept
            if is_parameter and (tensor.is_floating_point() or tensor.is_complex()):
                fresh.append(tensor)
    for tensor in fresh:
        tensor.requires_grad_(True)


def give_back(module: nn.Module) -> None:
    """Puts what ``module`` itself holds back to before locking, and forgets it (in place)."""
    _restore(module, parameters=True)
    for local, kept in module.__dict__.pop(_OWNED, {}).items():
        if (parameter := module._parameters.get(local)) is not None:
            parameter.requires_grad_(kept.trained)


def restore(model: nn.Module, *, parameters: bool) -> None:
    """Puts private buffers, and parameters too if asked, back to before locking (in place)."""
    for module in model.modules():
        _restore(module, parameters=parameters)


def _restore(module: nn.Module, *, parameters: bool) -> None:
    for local, kept in owned(module).items():
        tensor = module._buffers.get(local)
        if parameters and tensor is None:
            tensor = module._parameters.get(local)
        if tensor is not None:
            with torch.no_grad():
                tensor.copy_(kept.value)


def draw_private(model: nn.Module, key: Key) -> None:
    """Draws the private parameters from the key (in place); buffers start as before locking.

    By PyTorch's own laws: linear layers and convolutions U(±1/√fan_in), their biases too, of
    complex ones the real and the imaginary part; norms start at 1 and 0; recurrent layers
    U(±1/√hidden); embeddings N(0, 1) with zeros for padding; attention as
    ``nn.MultiheadAttention``. Parameters of other modules are drawn as those of linear layers.
    """
    restore(model, parameters=False)
    with torch.no_grad():
        for module in model.modules():
            for local, kept in owned(module).items():
                parameter = module._parameters.get(local)
                if kept.stream is not None and parameter is not None:
                    stream = key.stream(f"stem/{kept.stream}")
                    parameter.copy_(_start(local, module, parameter, stream))


def _start(name: str, owner: nn.Module, parameter: Tensor, stream: KeyStream) -> Tensor:
    shape = tuple(parameter.shape)
    if is_norm(owner):
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        rows: Tensor = stream.normal(shape)
        if owner.padding_idx is not None:
            rows[owner.padding_idx] = 0
        return rows
    if name in ("bias_k", "bias_v") and isinstance(owner, nn.MultiheadAttention):
        added: Tensor = stream.normal(shape) * parameter.shape[-1] ** -0.5
        return added
    bound = _bound(name, owner, parameter)
    if parameter.is_complex():
        return torch.view_as_complex((stream.uniform((*shape, 2)) * 2 - 1) * bound)
    start: Tensor = (stream.uniform(shape) * 2 - 1) * bound
    return start


def _bound(name: str, owner: nn.Module, parameter: Tensor) -> float:
    """B of the law U(±B) that a parameter is drawn by."""
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        return math.sqrt(1 / max(owner.hidden_size, 1))
    if isinstance(owner, nn.MultiheadAttention):
        return 0.0 if parameter.ndim == 1 else math.sqrt(6 / sum(parameter.shape))
    if name == "bias" and isinstance(owner, NonDynamicallyQuantizableLinear):
        return 0.0  # the last layer of attention
    like = _matrix(owner, parameter) if parameter.ndim == 1 else parameter
    inputs = like.numel() // like.shape[0] if like.ndim else 1
    bound: float = float(max(inputs, 1)) ** -0.5
    return bound


def _matrix(owner: nn.Module, bias: Tensor) -> Tensor:
    """The weight that a parameter of one axis belongs to; the parameter itself if there is none."""
    weight = owner._parameters.get("weight")
    if weight is not None or kind_of(owner) != "other":
        return bias if weight is None else weight
    sides = (p for p in owner._parameters.values() if p is not None and p.ndim > 1)
    return max((p for p in sides if len(p) == len(bias)), key=Tensor.numel, default=bias)
