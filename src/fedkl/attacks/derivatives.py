"""Batch normalization and convolutions whose second derivatives are written out.

Matching a gradient differentiates a gradient. torch's second derivative of a convolution always
computes that by the weights, a quarter of all time, which nobody asks for if they are fixed; of
batch norm it is some fifty elementwise operations, here five sums and two linear combinations.

Batch norm: with x̂ = (x - mean) / σ, upstream gradient g and, over the n values of a channel,

    P(g) = g - mean(g) - x̂·mean(g·x̂),    dx = γ·P(g)/σ,    dγ = Σ g·x̂,    dβ = Σ g

the derivative of ⟨v, dx⟩ + ⟨p, dγ⟩ + ⟨q, dβ⟩ is

    by g:  γ·P(v)/σ + p·x̂ + q
    by γ:  ⟨v, P(g)⟩/σ
    by x:  P(h)/σ - x̂·γ·⟨v, P(g)⟩/(n·σ²),  h = p·g - γ·(v·mean(g·x̂) + g·mean(v·x̂))/σ

(P is symmetric; h is what reaches x̂, the last term what reaches σ, with dσ/dx = x̂/n.)

Convolution y = x ∗ w: dx = g ∗ᵀ w and dw = x ⋆ g are bilinear, so the derivative of
⟨v, dx⟩ + ⟨p, dw⟩ is v ∗ w + x ∗ p by g, g ∗ᵀ p by x, and v ⋆ g by w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode


class TwiceDifferentiable(TorchFunctionMode):
    """Within it, convolutions, and batch norms over a batch's own statistics, are ours.

    Same values and derivatives; there is no forward mode. Everything else passes through.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        if func in _CONVOLUTIONS:
            return _convolution(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The signature of :func:`torch.nn.functional.batch_norm`."""
    x = input
    if not training or running_mean is not None or x.numel() in (0, x.shape[1]):
        return batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = x.new_ones(x.shape[1]) if weight is None else weight
    shift = x.new_zeros(x.shape[1]) if bias is None else bias
    out: Tensor = _Norm.apply(x, scale, shift, eps)[0]
    return out


class _Norm(Function):
    """x (N, C, ...), γ and β (C,) to the output, and mean and 1/σ of x (C,)."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, ...]:
        return torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, scale, _, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, scale, *output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, inverse = ctx.saved_tensors
        return *_NormBackward.apply(gradients[0], x, scale, mean, inverse, ctx.eps), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _folded(_Norm, info.batch_size, in_dims, inputs)


class _NormBackward(Function):
    """Upstream gradient and what :class:`_Norm` saw to the gradients by x, γ and β.

    ``mean`` and ``inverse`` are functions of x: the derivative by x is the whole one.
    """

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, scale: Tensor, mean: Tensor, inverse: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(
            g, x, scale, None, None, mean, inverse, True, eps, [True, True, True]
        )
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, v: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor | None, ...]:
        g, x, scale, mean, inverse, along, total = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone may go on differentiating, by x and g
            mean = _sum(x) / _count(x)
            centered = x - _like(mean, x)
            inverse = (_dot(centered, centered) / _count(x) + ctx.eps).rsqrt()
            along, total = _dot(g, centered) * inverse, _sum(g)
        return *_second(v, p, q, g, x, scale, mean, inverse, along, total), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _folded(_NormBackward, info.batch_size, in_dims, inputs)


def _folded(
    function: type[Function], size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A batch of problems as one with more channels: no channel knows of another."""
    folded = [
        _fold(t, dim, size) if isinstance(t, Tensor) else t
        for t, dim in zip(inputs, in_dims, strict=True)
    ]
    outputs = function.apply(*folded)
    at = tuple(min(t.dim() - 1, 1) for t in outputs)
    return tuple(t.unflatten(dim, (size, -1)) for t, dim in zip(outputs, at, strict=True)), at


def _fold(t: Tensor, dim: int | None, size: int) -> Tensor:
    return _into(t, dim, size, min(t.dim() - (dim is not None) - 1, 1))


def _into(t: Tensor, dim: int | None, size: int, at: int) -> Tensor:
    """Puts axis ``dim`` (absent: the same for all) in front of axis ``at`` of the rest, into it."""
    t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.movedim(0, at).flatten(at, at + 1)


def _second(
    v: Tensor, p: Tensor, q: Tensor, g: Tensor, x: Tensor, scale: Tensor, mean: Tensor,
    inverse: Tensor, along: Tensor, total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Derivatives by g, x and γ. ``along`` is Σ g·x̂, ``total`` Σ g."""
    n = _count(x)
    mean_g, mean_v = total / n, _sum(v) / n
    a, b = inverse * (_dot(v, x) / n - mean * mean_v), along / n  # mean(v·x̂), mean(g·x̂)
    both = _dot(v, g) - n * (mean_v * mean_g + a * b)  # ⟨v, P(g)⟩
    k = scale * inverse

    # By g: k·v + (p - k·a)·x̂ + q - k·mean(v)
    slope = (p - k * a) * inverse
    by_g = _combine(((k, v), (slope, x)), q - k * mean_v - slope * mean)

    # By x: P(h)/σ less what reaches σ. P takes the constant and x̂ out of h.
    of_v, of_g = -k * b, p - k * a
    slope = -(of_v * a + of_g * b + k * both / n) * inverse
    rest = -(of_v * mean_v + of_g * mean_g) - slope * mean
    by_x = _combine(
        ((of_v * inverse, v), (of_g * inverse, g), (slope * inverse, x)), rest * inverse
    )
    return by_g, by_x, both * inverse


def _combine(terms: Sequence[tuple[Tensor, Tensor]], constant: Tensor) -> Tensor:
    """Σ coefficient · values + constant, coefficients (C,) and values (N, C, ...)."""
    total = _like(constant, terms[0][1])
    for coefficient, values in terms:
        total = torch.addcmul(total, _like(coefficient, values), values)
    return total


def _like(t: Tensor, values: Tensor) -> Tensor:
    """(C,) as (C, 1, ...), to go with ``values`` (N, C, ...)."""
    return t.reshape(-1, *(1 for _ in values.shape[2:]))


def _count(t: Tensor) -> int:
    """Values a channel."""
    return t.numel() // t.shape[1]


def _sum(t: Tensor) -> Tensor:
    return t.sum(dim=(0, *range(2, t.dim())))


def _dot(t: Tensor, u: Tensor) -> Tensor:
    """Σ t·u per channel."""
    return _sum(t * u)


_CONVOLUTIONS: Final = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


@dataclass(frozen=True)
class _Geometry:
    """How a convolution lies on its input, and which gradients of its two are wanted.

    One object, for functorch looks at every number in a tuple.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    by_x: bool = True
    by_w: bool = True

    def times(self, size: int) -> _Geometry:
        """That of ``size`` convolutions side by side."""
        return replace(self, groups=self.groups * size)

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        none = [0] * len(self.stride)
        return torch.convolution(
            x, w, b, self.stride, self.padding, self.dilation, False, none, self.groups
        )

    def backward(
        self, g: Tensor, x: Tensor, w: Tensor, by_x: bool, by_w: bool
    ) -> tuple[Tensor, ...]:
        """The gradients that are wanted."""
        none = [0] * len(self.stride)
        found = torch.ops.aten.convolution_backward(
            g, x, w, None, self.stride, self.padding, self.dilation, False, none, self.groups,
            [by_x, by_w, False],
        )  # fmt: skip
        return tuple(t for t, wanted in zip(found, (by_x, by_w), strict=False) if wanted)


def _convolution(
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """The signature of :func:`torch.conv2d` and its like."""
    x, dims = input, _CONVOLUTIONS[func]
    if isinstance(padding, str) or x.dim() != dims + 2:
        return func(x, weight, bias, stride, padding, dilation, groups)

    def each(n: int | Sequence[int]) -> tuple[int, ...]:
        return (n,) * dims if isinstance(n, int) else tuple(n)

    geometry = _Geometry(each(stride), each(padding), each(dilation), groups)
    out: Tensor = _Conv.apply(x, weight, bias, geometry)
    return out


class _Conv(Function):
    """Images, weights and bias to the output."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, geometry: _Geometry) -> Tensor:
        return geometry.forward(x, w, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _, ctx.geometry = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        by_x, by_w, by_b, _ = ctx.needs_input_grad
        wanted = replace(ctx.geometry, by_x=by_x, by_w=by_w)
        found = iter(_ConvBackward.apply(g, x, w, wanted) if by_x or by_w else ())
        return (
            next(found) if by_x else None,
            next(found) if by_w else None,
            _sum(g) if by_b else None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        size, (x, w, b, geometry), (of_x, of_w, of_b, _) = info.batch_size, inputs, in_dims
        if of_w is None and of_b is None:
            return _Conv.apply(_into(x, of_x, size, 0), w, b, geometry).unflatten(0, (size, -1)), 0
        x, w = _into(x, of_x, size, 1), _into(w, of_w, size, 0)
        b = None if b is None else _into(b, of_b, size, 0)
        return _Conv.apply(x, w, b, geometry.times(size)).unflatten(1, (size, -1)), 1


class _ConvBackward(Function):
    """Upstream gradient, images and weights to the gradients by images and weights, if wanted."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, w: Tensor, geometry: _Geometry) -> tuple[Tensor, ...]:
        return geometry.backward(g, x, w, geometry.by_x, geometry.by_w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.geometry = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> tuple[Tensor | None, ...]:
        (g, x, w), geometry = ctx.saved_tensors, ctx.geometry
        need_g, need_x, need_w, _ = ctx.needs_input_grad
        v, p = along[0] if geometry.by_x else None, along[-1] if geometry.by_w else None
        by_g = by_x = by_w = None
        if need_g:
            parts = [(t, u) for t, u in ((v, w), (x, p)) if t is not None and u is not None]
            by_g = torch.stack([geometry.forward(t, u) for t, u in parts]).sum(dim=0)
        if need_x and p is not None:
            (by_x,) = geometry.backward(g, x, p, by_x=True, by_w=False)
        if need_w and v is not None:
            (by_w,) = geometry.backward(g, v, w, by_x=False, by_w=True)
        return by_g, by_x, by_w, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size, (g, x, w, geometry) = info.batch_size, inputs
        found: list[tuple[Tensor, int]] = []
        by_x, by_w = geometry.by_x, geometry.by_w
        if by_x and in_dims[2] is None:  # the same weights for all: more images
            many = _into(g, in_dims[0], size, 0), _into(x, in_dims[1], size, 0)
            (made,) = _ConvBackward.apply(*many, w, replace(geometry, by_w=False))
            found.append((made.unflatten(0, (size, -1)), 0))
            by_x = False
        if by_x or by_w:
            many = _into(g, in_dims[0], size, 1), _into(x, in_dims[1], size, 1)
            wanted = replace(geometry.times(size), by_x=by_x, by_w=by_w)
            made = iter(_ConvBackward.apply(*many, _into(w, in_dims[2], size, 0), wanted))
            found += [
                (next(made).unflatten(at, (size, -1)), at)
                for at, one in ((1, by_x), (0, by_w))
                if one
            ]
        return tuple(t for t, _ in found), tuple(at for _, at in found)
