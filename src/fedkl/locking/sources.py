"""Affine sources: the modules that compute the scale γ and shift β of a locked norm."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedkl.errors import LockError, SecretError

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "identity": lambda value: value,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

PICKLE_REMEDY = (
    "a locked model is not pickled, since it may hold a key; save its tensors with "
    "safetensors from model.state_dict(), save the key with key.save(path), and lock a fresh "
    "model with it after loading"
)


class Sealed:
    """A tensor that is neither parameter nor buffer and never shows itself.

    It is in no state dict, its repr is redacted and it refuses to be pickled.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __repr__(self) -> str:
        return "Sealed(<secret>)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SecretError(PICKLE_REMEDY)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sealed:
        return self  # nothing writes into it; another key comes in another Sealed


LOST: Final = (
    "this lock's secret was emptied with the rest of the model (to_empty, or a visit to the meta "
    "device), and no state dict brings it back: put the key in again with "
    "fedkl.set_key(model, key)."
)


def kept(before: Tensor, after: Tensor) -> bool:
    """Whether a secret came through a move or cast of its module: its values are what they were."""
    if before.is_meta or after.is_meta:
        return False
    was, now = before.detach().double(), after.detach().to(before.device).double()
    return bool((now - was).norm() <= 0.02 * was.norm())  # not so if anything is NaN


def copy_of(module: nn.Module, base: type[nn.Module], memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a module that refuses to be pickled, by the state that ``base`` says it has.

    What was compiled of a module is no part of that; the copy would call the old one.
    """
    new = type(module).__new__(type(module))
    memo[id(module)] = new
    # A layer may say that it has less; the state of an ordinary one is all it has.
    state = deepcopy(base.__getstate__(module), memo)  # type: ignore[no-untyped-call]
    new.__setstate__(state)  # type: ignore[no-untyped-call]
    return new


class AffineSource(nn.Module, ABC):
    """Computes γ and β of one site. Child ``keylock`` of every locked norm."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self._witness: set[str] | None = None

    def scale(self) -> Tensor:
        """γ, shaped like the norm's own weight."""
        if self._witness is not None:
            self._witness.add("scale")
        return self._scale().view(self.shape)

    def shift(self) -> Tensor:
        """β, shaped like the norm's own bias."""
        if self._witness is not None:
            self._witness.add("shift")
        return self._shift().view(self.shape)

    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of γ and β."""
        return self._scale().detach()

    def freeze(self, *, scale: bool, shift: bool) -> None:
        """Takes what is learned of γ, of β, out of the training (in place)."""
        for name, parameter in self.named_parameters():
            of_scale = name.startswith(("gamma", "scale"))
            parameter.requires_grad_(not (scale if of_scale else shift))

    @abstractmethod
    def _scale(self) -> Tensor: ...

    @abstractmethod
    def _shift(self) -> Tensor: ...


class PrivateAffine(AffineSource):
    """Learned γ and β that stay on the client, without a key (FedBN, Li et al. 2021)."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__(tuple(scale.shape))
        self.gamma = nn.Parameter(scale.detach().clone())
        self.beta = nn.Parameter(shift.detach().clone())

    def _scale(self) -> Tensor:
        return self.gamma

    def _shift(self) -> Tensor:
        return self.beta


class KeyedAffine(AffineSource):
    """γ = act(W_γ u + b_γ), β = act(W_β u + b_β) (arXiv 2305.04095, section 4).

    ``u`` is the key vector, or the γ (for the scale) and the β (for the shift) of ``previous`` in
    the chained form, times ``factor``. Both matrices are parameters of this module and private.

    Args:
        shape: Shape of γ and of β.
        inputs: Length of ``u``.
        factor: Number that ``u`` is multiplied by; 1/√inputs makes a step of size lr on γ out of
            a step of size lr on W, whatever the key's length.
        bias: Whether the maps have a bias.
        activation: A name in :data:`ACTIVATIONS`.
        key_vector: The key vector, or None with ``previous``.
        previous: The source whose γ and β are mapped on.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        inputs: int,
        *,
        factor: float,
        bias: bool,
        activation: str,
        key_vector: Tensor | None,
        previous: KeyedAffine | None,
    ) -> None:
        super().__init__(shape)
        features = math.prod(shape)
        self.factor = factor
        self.activation = activation
        self.scale_weight = nn.Parameter(torch.empty(features, inputs))
        self.shift_weight = nn.Parameter(torch.empty(features, inputs))
        self.scale_bias = nn.Parameter(torch.zeros(features)) if bias else None
        self.shift_bias = nn.Parameter(torch.zeros(features)) if bias else None
        self._sealed = None if key_vector is None else Sealed(key_vector * factor)
        self._master = self._sealed
        self._lost = False
        # A tuple hides the neighbor from nn.Module, which would register it as a child.
        self._previous = (previous,)

    @property
    def chained(self) -> bool:
        """Whether another source feeds this one."""
        return self._previous[0] is not None

    def set_key_vector(self, vector: Tensor) -> None:
        """Puts another key's vector in place; a source that is fed by another has none."""
        if self._sealed is not None:
            old = self._sealed.tensor
            self._master = Sealed(vector * self.factor)
            self._sealed = Sealed(self._master.tensor.to(old.device, old.dtype))
            self._lost = False

    def inputs(self) -> tuple[Tensor, Tensor]:
        """What the two matrices are multiplied with: (for the scale, for the shift)."""
        previous = self._previous[0]
        if previous is None:
            assert self._sealed is not None
            return self._sealed.tensor, self._sealed.tensor
        return previous._scale() * self.factor, previous._shift() * self.factor

    def _scale(self) -> Tensor:
        previous = self._previous[0]
        return self._map(
            self.scale_weight, self.scale_bias, previous._scale() if previous else None
        )

    def _shift(self) -> Tensor:
        previous = self._previous[0]
        return self._map(
            self.shift_weight, self.shift_bias, previous._shift() if previous else None
        )

    def _map(self, weight: Tensor, bias: Tensor | None, before: Tensor | None) -> Tensor:
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            # A lock in half precision would hear another key.
            with torch.autocast(device, enabled=False):
                return self._linear(weight, bias, before)
        return self._linear(weight, bias, before)

    def _linear(self, weight: Tensor, bias: Tensor | None, before: Tensor | None) -> Tensor:
        if before is None:
            assert self._sealed is not None
            if self._lost:
                raise LockError(LOST)
            value = torch.mv(weight, self._sealed.tensor.to(weight.device))
        else:
            value = torch.mv(weight, before.to(weight.device) * self.factor)
        return ACTIVATIONS[self.activation](value if bias is None else value + bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeyedAffine:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._sealed is not None:
            assert self._master is not None
            # From the numbers as drawn: a visit to half precision costs no digits.
            old = self._sealed.tensor
            self._sealed = Sealed(fn(self._master.tensor.to(old.device)))
            self._lost = self._lost or not kept(old, self._sealed.tensor)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SecretError(PICKLE_REMEDY)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy_of(self, type(self), memo)

    def extra_repr(self) -> str:
        inputs = self.scale_weight.shape[1]
        return f"features={math.prod(self.shape)}, inputs={inputs}, activation={self.activation}"
