"""Private layers: the stem before the first lock, and a private head. Their weights come from the
key, never from weights that others have seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from fedkl.key import Key, KeyStream
from fedkl.locking.survey import is_norm

_ORIGINAL = "_fedkl_private"


def make_private(model: nn.Module, names: Iterable[str]) -> None:
    """Writes down the named tensors as they are, so that :func:`give_back` can (in place)."""
    state = model.state_dict(keep_vars=True)
    # Not every buffer is in the state dict; those that are not never leave the client either.
    kept = {name: state[name].detach().clone() for name in names if name in state}
    model.__dict__[_ORIGINAL] = kept


def give_back(model: nn.Module) -> None:
    """Puts private layers back to what they were before locking, and forgets that (in place)."""
    restore(model, parameters=True)
    model.__dict__.pop(_ORIGINAL, None)


def restore(model: nn.Module, *, parameters: bool) -> None:
    """Puts private buffers, and parameters too if asked, back to before locking (in place)."""
    original: dict[str, Tensor] = model.__dict__.get(_ORIGINAL, {})
    state = model.state_dict(keep_vars=True) if original else {}
    with torch.no_grad():
        for name, before in original.items():
            if parameters or not isinstance(state[name], nn.Parameter):
                state[name].copy_(before)


def draw_private(model: nn.Module, names: Iterable[str], key: Key) -> None:
    """Draws the named parameters from the key (in place); buffers start as before locking.

    Weights follow PyTorch's own law for linear layers and convolutions, U(±1/√fan_in), their
    biases too; norms start at 1 and 0.
    """
    restore(model, parameters=False)
    wanted = set(names)
    with torch.no_grad():
        for name, owner, parameter in _parameters(model):
            if name in wanted:
                parameter.copy_(_start(name, owner, parameter, key.stream(f"stem/{name}")))


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Each parameter once, under its first name."""
    for name, parameter in model.named_parameters():
        yield name, model.get_submodule(name.rpartition(".")[0]), parameter


def _start(name: str, owner: nn.Module, parameter: Tensor, stream: KeyStream) -> Tensor:
    shape = tuple(parameter.shape)
    if is_norm(owner):
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    weight = owner._parameters.get("weight")
    like = parameter if parameter.ndim > 1 or weight is None else weight
    inputs = like.numel() // like.shape[0] if like.ndim else 1
    bound = float(max(inputs, 1)) ** -0.5
    start: Tensor = (stream.uniform(shape) * 2 - 1) * bound
    return start
