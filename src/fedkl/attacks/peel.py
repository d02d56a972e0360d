"""The recursive closed form: from the classifier's gradient down to the image, by linear algebra.

R-GAP (Zhu and Blaschko 2021, "R-GAP: Recursive Gradient Attack on Privacy") for stacks of
convolution, norm, sigmoid, extended to norms whose scale γ, shift β and running state nobody knows.

At batch 1 a batch norm takes its statistics from the one image. Its output u = γ x̂ + β, read off
behind the sigmoid, therefore tells β (its mean over positions) and |γ| (its deviation) by itself,
whatever the key; x̂ is known but for the sign of γ. What is left unknown per channel is one number
r = σ/γ, sign included, and one mean m, both of which stand linearly in

    forward:   conv(h) - r·(u - β) - m = 0
    backward:  Σ_p d_p·patch_p(h) - r·∂L/∂W = 0

with d what the norm's backward makes of the gradient by u, but for the factor γ/σ. The solution
(h, r, m) is the null vector of a matrix; its length is found by requiring that the layer below has
one too. So a lock with one γ and β per channel hides nothing here, with no key, no public image and
no search over signs. One γ and β per position stops it: then u tells nothing about x̂.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.functional import unfold
from torch.nn.grad import conv2d_input

from fedkl.attacks.base import Attack, Progress, Reconstruction, each
from fedkl.attacks.closed_form import inexact
from fedkl.attacks.labels import classifier, infer_labels
from fedkl.attacks.network import Network
from fedkl.errors import AttackError, ConfigError
from fedkl.observation import Observation

# In float64: the smallest singular value has to stand out of rounding.
EXACT: Final = torch.float64
DOUBTFUL: Final = 0.3
"""Misfit above which an image may have nothing to do with the true one."""
LARGEST: Final = 4e8
"""Numbers in the equations of one convolution; at work they are there three times."""
_LOW, _HIGH = -4.0, 6.0  # log odds of the largest activation


@dataclass(frozen=True)
class Stage:
    """One convolution, what it maps, and whether a norm follows it.

    Attributes:
        name: Of the convolution.
        weight: (O, I, k, k), exact.
        bias: (O,) or None; a norm takes it away.
        stride, padding: Of the convolution.
        before, after: (I, H, W) and (O, H', W').
        normed: A norm over positions stands behind it.
        basis: Patches of every unit image (I*H*W, I*k*k, H'*W').
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    stride: int
    padding: int
    before: tuple[int, int, int]
    after: tuple[int, int, int]
    normed: bool
    basis: Tensor


@dataclass(frozen=True)
class Solved:
    """A layer's input (flat), the gradient by it, and how far from exact the equations hold."""

    h: Tensor
    delta: Tensor
    misfit: float


class Peel(Attack):
    """Layer by layer from the classifier down, batch 1.

    For models that are a sequence of convolution, perhaps a batch or instance norm, sigmoid,
    repeated, then flatten and a linear classifier with a bias: LeNet. Where a norm follows the
    first convolution, brightness and contrast of the image cannot be known; it is scaled to fill
    [0, 1].

    Args:
        coarse: Lengths of a null vector that are tried before the best is refined, at least 2.
        fine: Evaluations of the refinement, at least 1.
    """

    name: ClassVar[str] = "peel"

    def __init__(self, *, coarse: int = 16, fine: int = 16) -> None:
        super().__init__(coarse=coarse, fine=fine)
        if coarse < 2 or fine < 1:  # the lengths go from a least to a greatest one
            raise ConfigError(
                f"got coarse {coarse}, fine {fine}; expected 2 or more coarse, 1 or more fine."
            )
        self.coarse, self.fine = coarse, fine

    def reconstruct(
        self,
        observations: Sequence[Observation],
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> list[Reconstruction]:
        """As :meth:`Attack.reconstruct`; the loss is the misfit of the lowest layer.

        A note says so where it is above :data:`DOUBTFUL`.

        Raises:
            AttackError: Not batch 1 and one step, another architecture, or a private convolution.
        """
        if not observations:
            raise AttackError("got no observation; expected one or more.")
        first = observations[0]
        if first.training.presentations != 1:
            raise AttackError(
                f"got updates of {first.training.presentations} presentations; the recursive "
                "closed form takes one image in one step."
            )
        network = Network.of(observations)
        stages = stages_of(network, first)
        total, done = sum(o.count for o in observations), 0

        def peel(observation: Observation) -> Reconstruction:
            nonlocal done
            solved = []
            for change in observation.changes:
                solved.append(self._peel(stages, change, network, observation.num_classes))
                done += 1
                if progress is not None:
                    progress(done, total, solved[-1].misfit)
            return Reconstruction(
                images=torch.stack([_picture(one.h, stages[0]) for one in solved])[:, None],
                labels=infer_labels(observation, network),
                loss=sum(one.misfit for one in solved) / len(solved),
                notes=(*_doubts(solved), *inexact(observation)),
            )

        return each(observations, peel)

    def _peel(
        self, stages: Sequence[Stage], change: Mapping[str, Tensor], network: Network, classes: int
    ) -> Solved:
        weight, bias = classifier(network, classes)
        assert bias is not None
        missed, gradient = change[bias].to(EXACT), change[weight].to(EXACT)
        if not bool(missed.any()):
            raise AttackError(
                f"the gradient of {bias} is zero everywhere (a loss of zero): there is nothing to "
                "peel from; use another attack."
            )
        features = (missed @ gradient) / (missed @ missed)
        delta = network.shared[weight].to(EXACT).T @ missed
        found = Solved(features, delta, 0.0)
        scaled = True  # whether the length of found.h is known
        for stage in reversed(stages):
            seen = change[f"{stage.name}.weight"].to(EXACT)
            above = found if scaled else self._scaled(found, stage, seen)
            found, scaled = solve(above, stage, seen), not stage.normed
        return found

    def _scaled(self, found: Solved, stage: Stage, seen: Tensor) -> Solved:
        """``found`` at the length with which ``stage`` below it fits best."""
        top = float(found.h.max())

        def at(odds: float) -> Solved:
            length = float(torch.sigmoid(torch.tensor(odds, dtype=EXACT))) / top
            # The norm's σ grows with its input, so the gradient that comes back shrinks with it.
            return Solved(found.h * length, found.delta / length, found.misfit)

        def misfit(odds: float) -> float:
            return solve(at(odds), stage, seen, values_only=True).misfit

        step = (_HIGH - _LOW) / (self.coarse - 1)
        best = min((_LOW + i * step for i in range(self.coarse)), key=misfit)
        bounds = (best - step, best + step)
        options = {"maxiter": self.fine, "xatol": 1e-7}
        refined = minimize_scalar(misfit, bounds=bounds, method="bounded", options=options)
        return at(float(refined.x))


def solve(above: Solved, stage: Stage, seen: Tensor, *, values_only: bool = False) -> Solved:
    """The input of ``stage`` from its activation and the gradient by it.

    Args:
        above: Sigmoid activations (flat, length known) and the gradient by them.
        stage: The convolution.
        seen: Observed gradient of its weight.
        values_only: Only the misfit is wanted; the vectors are empty then.
    """
    channels = stage.after[0]
    h = above.h.view(channels, -1).clamp(1e-12, 1 - 1e-12)
    u, du = torch.logit(h), above.delta.view(channels, -1) * h * (1 - h)
    if not stage.normed:
        return _solve_plain(u, du, stage, seen)
    shift = u.mean(dim=1, keepdim=True)
    x = (u - shift) / u.std(dim=1, keepdim=True, correction=0).clamp_min(1e-12)
    d = du - du.mean(dim=1, keepdim=True) - x * (du * x).mean(dim=1, keepdim=True)
    matrix = _equations(stage, d, u - shift, seen)
    lengths = matrix.norm(dim=0).clamp_min(1e-300)
    gram = (matrix / lengths).T @ (matrix / lengths)
    if values_only:
        return Solved(h.new_empty(0), h.new_empty(0), _ratio(torch.linalg.eigvalsh(gram)))
    values, vectors = torch.linalg.eigh(gram)
    null = vectors[:, 0] / lengths
    size = len(stage.basis)
    # Activations are positive, so their sum tells the sign of the null vector.
    null = null * torch.where(null[:size].sum() < 0, -1.0, 1.0)
    r = null[size : size + channels]
    return Solved(null[:size], _back(d / _nonzero(r)[:, None], stage), _ratio(values))


def _solve_plain(u: Tensor, du: Tensor, stage: Stage, seen: Tensor) -> Solved:
    """Without a norm everything is known: two sets of linear equations, least squares."""
    forward, backward = _blocks(stage, du)
    bias = 0.0 if stage.bias is None else stage.bias[:, None]
    one, other = forward.flatten(0, 1), backward.flatten(0, 1)
    a, b = one.norm(), other.norm().clamp_min(1e-300)
    matrix = torch.cat([one / a, other / b])
    right = torch.cat([(u - bias).flatten() / a, seen.flatten() / b])
    h = torch.linalg.lstsq(matrix, right[:, None]).solution[:, 0]
    misfit = float((matrix @ h - right).norm() / right.norm().clamp_min(1e-300))
    return Solved(h, _back(du, stage), misfit)


def _blocks(stage: Stage, d: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution (O, P, n) and the weight gradient (O, Ikk, n) as matrices on the input."""
    forward = torch.einsum("oq,nqp->opn", stage.weight.flatten(1), stage.basis)
    backward = torch.einsum("op,nqp->oqn", d, stage.basis)
    return forward, backward


def _equations(stage: Stage, d: Tensor, centered: Tensor, seen: Tensor) -> Tensor:
    """The homogeneous equations in (h, r, m), each block of norm 1."""
    forward, backward = _blocks(stage, d)
    channels, positions, _ = forward.shape
    eye = torch.eye(channels, dtype=EXACT)
    r_forward = -torch.einsum("op,oc->opc", centered, eye)
    m_forward = -eye[:, None, :].expand(channels, positions, channels)
    r_backward = -torch.einsum("oq,oc->oqc", seen.flatten(1), eye)
    top = torch.cat([forward, r_forward, m_forward], dim=2).flatten(0, 1)
    bottom = torch.cat([backward, r_backward, torch.zeros_like(r_backward)], dim=2).flatten(0, 1)
    return torch.cat([top / top.norm(), bottom / bottom.norm().clamp_min(1e-300)])


def _back(d: Tensor, stage: Stage) -> Tensor:
    """The gradient by the convolution's input, flat."""
    out = d.view(1, *stage.after)
    size = (1, *stage.before)
    found: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
        size, stage.weight, out, stride=stage.stride, padding=stage.padding
    )
    return found.flatten()


def _ratio(values: Tensor) -> float:
    """How far the smallest singular value stands out: 0 is exact, 1 is not at all."""
    return float((values[0].clamp_min(0) / values[1].clamp_min(1e-300)).sqrt())


def _nonzero(values: Tensor) -> Tensor:
    tiny = 1e-12 * values.abs().max().clamp_min(1e-300)
    return torch.where(values.abs() < tiny, tiny, values)


def _doubts(solved: Sequence[Solved]) -> tuple[str, ...]:
    """What to say of equations that do not hold.

    No error: rounding, noise and locks per position make them fail, and then the attack has failed,
    which is what an audit measures.
    """
    worst = max(one.misfit for one in solved)
    if worst <= DOUBTFUL:
        return ()
    return (
        f"peel's equations hold to a misfit of {worst:.1f} only (0 is exact, 1 not at all): the "
        "update was rounded or noised, or γ and β differ by position; its images are guesses",
    )


def _picture(flat: Tensor, stage: Stage) -> Tensor:
    """The image (C, H, W) in [0, 1], stretched over it where a norm hides its range."""
    x = flat.view(stage.before)
    if stage.normed:
        x = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-12)
    return x.clamp(0, 1).float()


def stages_of(network: Network, observation: Observation) -> list[Stage]:
    """The stages of a model that is a sequence this attack can read, first to last.

    Raises:
        AttackError: It is not, or a convolution is private.
    """
    children = list(network.model.named_children())
    kinds = [type(m).__name__ for _, m in children]
    shape, stages, i = observation.image_shape, [], 0
    while i < len(children) and isinstance(children[i][1], nn.Conv2d):
        name, conv = children[i]
        assert isinstance(conv, nn.Conv2d)
        inside = [m for m in conv.children() if _norm(m)]
        i += 1
        behind = i < len(children) and _norm(children[i][1])
        i += int(behind)
        if i >= len(children) or not isinstance(children[i][1], nn.Sigmoid):
            raise AttackError(_REFUSAL + f"; this one is {', '.join(kinds)}.")
        i += 1
        if f"{name}.weight" not in network.shared:
            raise AttackError(f"{name} is private: there is no gradient of it to be peeled off.")
        stages.append(_stage(name, conv, shape, bool(inside) or behind, network))
        shape = stages[-1].after
    if not stages or kinds[i:] != ["Flatten", "Linear"] or not network.training.train_mode:
        raise AttackError(_REFUSAL + f"; this one is {', '.join(kinds)}.")
    if classifier(network, observation.num_classes)[1] is None:
        raise AttackError("the classifier has no bias; the recursive closed form needs one.")
    return stages


_REFUSAL: Final = (
    "the recursive closed form reads convolution, norm, sigmoid, repeated, flatten and a linear "
    "classifier, in train mode"
)


def _norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d)


def _stage(
    name: str, conv: nn.Conv2d, before: tuple[int, int, int], normed: bool, network: Network
) -> Stage:
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    square = conv.stride[0] == conv.stride[1] and conv.kernel_size[0] == conv.kernel_size[1]
    square = square and isinstance(conv.padding, tuple)
    if not (plain and square and conv.padding[0] == conv.padding[1]):
        raise AttackError(f"{name} is no plain square convolution with zero padding.")
    stride, padding, size = int(conv.stride[0]), int(conv.padding[0]), conv.kernel_size[0]
    count = before[0] * before[1] * before[2]
    sides = [(side + 2 * padding - size) // stride + 1 for side in before[1:]]
    _check_memory(name, before, conv.weight.shape, sides[0] * sides[1])
    eye = torch.eye(count, dtype=EXACT).view(count, *before)
    bias = network.shared.get(f"{name}.bias")
    return Stage(
        name=name,
        weight=network.shared[f"{name}.weight"].to(EXACT),
        bias=None if bias is None else bias.to(EXACT),
        stride=stride,
        padding=padding,
        before=before,
        after=(conv.out_channels, sides[0], sides[1]),
        normed=normed,
        basis=unfold(eye, size, padding=padding, stride=stride),
    )


def _check_memory(
    name: str, before: tuple[int, int, int], weight: torch.Size, positions: int
) -> None:
    """Raises where the dense equations of a convolution would not fit.

    Raises:
        AttackError: They would not.
    """
    inputs, patch = math.prod(before), math.prod(weight[1:])
    rows = weight[0] * (positions + patch)
    if (needed := inputs * (2 * rows + patch * positions + inputs)) > LARGEST:
        raise AttackError(
            f"the equations of {name} on {before[0]}x{before[1]}x{before[2]} numbers would take "
            f"{3 * 8 * needed / 1e9:.0f} GB; take smaller images or fewer channels, or an attack "
            "that searches."
        )
