"""A batch norm and γ, β per position in one, for training steps on a CPU.

One after the other they read and write every activation more often than there is to compute:
x̂ = (x − μ)/σ is stored, and read again for γ ⊙ x̂ + β and its gradient. Here x̂ is never made:

    z = a ⊙ x + b,  a = γ/σ,  b = β − a μ

and with S₁ = Σ δ and S₂ = Σ δ ⊙ x over the batch, per position, δ the gradient of z,

    ∂β = S₁,  ∂γ = (S₂ − μ S₁)/σ,
    ∂x = a ⊙ δ − (m₁ + m₂ (x − μ)/σ)/σ,  m₁ = mean of γ ⊙ ∂β, m₂ = mean of γ ⊙ ∂γ

over the M numbers of a channel (Ioffe and Szegedy 2015, section 3, with γ under the sums).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from fedkl.locking.sources import AffineSource

_FUSED: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# From so many positions on, those of one image are summed while they are in the cache.
_LARGE: Final = 8_192


def fused(base: type[nn.Module], norm: nn.Module, x: Tensor, source: AffineSource) -> Tensor | None:
    """γ ⊙ norm(x) + β, or None where it has to be computed one after the other.

    Args:
        base: The norm's own class.
        norm: Without affine; its statistics move on.
        x: (N, C, *positions).
        source: γ and β, each (C, *positions).
    """
    if base not in _FUSED or not norm.training or not _plain(x):
        return None
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    mean, var = norm.running_mean, norm.running_var
    if norm.momentum is None or (mean is None) == norm.track_running_stats:
        return None
    scale, shift = source.scale(), source.shift()
    if x.shape[1:] != scale.shape or scale.dtype != x.dtype:
        return None
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    mean, var = torch.batch_norm_update_stats(x.detach(), mean, var, norm.momentum)
    inverse = (var + norm.eps).rsqrt()
    out: Tensor = _fuse(x, scale, shift, mean, inverse, norm.eps)
    return out


def _plain(x: Tensor) -> bool:
    """Whether x is what the form above is for, and nobody but autograd looks on."""
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and x.is_contiguous()
        and x.ndim > 1
        and x[:, 0].numel() > 1
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


class _Fused(torch.autograd.Function):
    """a ⊙ x + b as above; once more differentiable by way of the ordinary norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, inverse: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, scale, mean, inverse)
        ctx.eps = eps
        a = scale * _per_channel(inverse, scale)
        b = torch.addcmul(shift, a, _per_channel(mean, scale), value=-1)
        return torch.addcmul(b, x, a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_again(x, scale, grad, ctx.eps), None, None, None)
        of_shift, products = grad.sum(0), _products(grad, x)
        mu, inv = _per_channel(mean, scale), _per_channel(inverse, scale)
        of_scale = torch.addcmul(products, mu, of_shift, value=-1).mul_(inv)
        of_x = None
        if ctx.needs_input_grad[0]:
            first, second = (
                _channel_sums(scale * g) / x[:, 0].numel() for g in (of_shift, of_scale)
            )
            slope = -inverse.square() * second
            rest = -inverse * first - slope * mean
            of_x = torch.addcmul(_per_channel(rest, scale), x, _per_channel(slope, scale))
            of_x.addcmul_(grad, scale * inv)
        return of_x, of_scale, of_shift, None, None, None


_fuse: Final[Callable[..., Tensor]] = _Fused.apply


def _per_channel(value: Tensor, scale: Tensor) -> Tensor:
    return value.view(-1, *(1,) * (scale.ndim - 1))


def _channel_sums(value: Tensor) -> Tensor:
    return value.reshape(len(value), -1).sum(1)


def _products(grad: Tensor, x: Tensor) -> Tensor:
    """Σ δ ⊙ x over the batch."""
    if x[0].numel() < _LARGE:
        return (grad * x).sum(0)
    total = grad[0] * x[0]
    for one, other in zip(grad[1:].unbind(), x[1:].unbind(), strict=True):
        total.addcmul_(one, other)
    return total


def _again(
    x: Tensor, scale: Tensor, grad: Tensor, eps: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The same gradients with a graph of their own, for second derivatives."""
    # Not x itself, whose hooks would run here as well.
    same = x.view_as(x)
    x_hat = F.batch_norm(same, None, None, training=True, eps=eps)
    of_x = None
    if x.requires_grad:
        (of_x,) = torch.autograd.grad(x_hat, same, grad * scale, create_graph=True)
    return of_x, (grad * x_hat).sum(0), grad.sum(0)
