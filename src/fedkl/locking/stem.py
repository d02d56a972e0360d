"""Private layers: the stem before the first lock, and a private head. Their weights come from the
key, never from weights that others have seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from fedkl.errors import LockError
from fedkl.key import Key, KeyStream
from fedkl.locking.survey import is_norm

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

    Weights follow PyTorch's own law for linear layers and convolutions, U(±1/√fan_in), their
    biases too, of complex ones the real and the imaginary part; norms start at 1 and 0.
    """
    restore(model, parameters=False)
    with torch.no_grad():
        for module in model.modules():
            for local, kept in owned(module).items():
                parameter = module._parameters.get(local)
                if kept.stream is not None and parameter is not None:
                    stream = key.stream(f"stem/{kept.stream}")
                    parameter.copy_(_start(kept.stream, module, parameter, stream))


def _start(name: str, owner: nn.Module, parameter: Tensor, stream: KeyStream) -> Tensor:
    shape = tuple(parameter.shape)
    if is_norm(owner):
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    weight = owner._parameters.get("weight")
    like = parameter if parameter.ndim > 1 or weight is None else weight
    inputs = like.numel() // like.shape[0] if like.ndim else 1
    bound = float(max(inputs, 1)) ** -0.5
    if parameter.is_complex():
        return torch.view_as_complex((stream.uniform((*shape, 2)) * 2 - 1) * bound)
    start: Tensor = (stream.uniform(shape) * 2 - 1) * bound
    return start
