"""γ and β per position, applied to what a norm has normalized."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fedkl.errors import LockError
from fedkl.locking.sources import AffineSource

_STAGE: Final = 8


def positioned(source: AffineSource, x: Tensor, *, channels_first: bool = False) -> Tensor:
    """γ ⊙ x + β for ``x`` (N, *positions), in the dtype of ``x``.

    Of a pad over tokens (T, D) the first rows are used for shorter inputs.

    Args:
        source: γ and β, each of shape positions.
        x: What the norm has made of its input.
        channels_first: Whether ``x`` is (N, C, H, W), as a convolution leaves it. Says nothing
            about the result; compiled code is faster for knowing it.

    Raises:
        LockError: The positions are others than those of the lock.
    """
    shape = source.shape
    whole = x.shape[1:] == shape
    # Before γ and β are there: no frame of the error may show them.
    if not whole and (x.ndim != 3 or x.shape[2:] != shape[1:] or x.shape[1] > shape[0]):
        raise LockError(_misfit(shape, tuple(x.shape)))
    scale, shift = source.scale(), source.shift()
    if not whole:
        scale, shift = scale[: x.shape[1]], shift[: x.shape[1]]
    out: Tensor
    if channels_first and x.ndim == 4 and x.is_cpu and _compiling():
        out = _ChannelsLast.apply(x, scale, shift)
    else:
        out = torch.addcmul(shift, x, scale)
    return out if out.dtype == x.dtype else out.to(x.dtype)


def _compiling() -> bool:
    """Whether a compiler looks on, without torch.func, of which it cannot follow our form.

    Inductor lets every convolution on a CPU, and so what follows it, run with the channels last.
    """
    return torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def _misfit(pad: tuple[int, ...], called: tuple[int, ...]) -> str:
    return (
        f"this lock has one scale per position, {pad}, and was called with {called[1:]} for each "
        "of a batch; keep to the size of the example, or for token sequences lock with "
        "max_length=<the longest>."
    )


class _ChannelsLast(torch.autograd.Function):
    """addcmul over (N, C, H, W), in terms of tensors that have their channels last.

    For the compiler alone, which makes slow loops of the plain form: one that turns γ and β around
    anew for every image, and sums over the batch that jump through memory number by number.
    """

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        out = x.permute(0, 2, 3, 1) * _turned(scale) + _turned(shift)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        # It is read three times: otherwise made anew each time, shortcuts and activations included.
        last = _there(grad.permute(0, 2, 3, 1).contiguous())
        of_x = (last * _turned(scale)).permute(0, 3, 1, 2)
        of_scale = _over_batch(last * x.permute(0, 2, 3, 1)).permute(2, 0, 1)
        of_shift = _over_batch(last).permute(2, 0, 1)
        return of_x.to(x.dtype), of_scale.to(scale.dtype), of_shift.to(scale.dtype)


def _turned(value: Tensor) -> Tensor:
    """(C, H, W) as (H, W, C), in memory too."""
    return _there(value.permute(1, 2, 0).contiguous())


def _there(value: Tensor) -> Tensor:
    """The same; written to memory, since the compiler views by strides only what is there."""
    return value.as_strided(value.shape, value.stride())


def _over_batch(value: Tensor) -> Tensor:
    """Sum over the first axis, in two stages where that goes: (N, H, W, C) as (H, W, C).

    Images lie a power of two apart as a rule: all of a batch at once compete for the same few
    lines of the cache.
    """
    count = value.shape[0]
    if count > _STAGE and count % _STAGE == 0:
        value = value.reshape(count // _STAGE, _STAGE, *value.shape[1:]).sum(1)
    return value.sum(0)
