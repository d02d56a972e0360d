"""What is left of one gradient when neither its size nor its coordinates may be asked about.

Whatever a turned and rescaled gradient still has: how much of it lies along the public weights
(nothing, if every layer were blind to the scale of its weights, which the epsilon of norms
prevents); how its size is spread over tensors, and within them over entries, rows and columns. An
attacker without the key knows from clients of its own how far these follow from the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedkl.attacks.adaptive.sketch import Sketch, Tensors

_LARGEST = 4  # rows and columns of a tensor
_LIMIT = 6.0  # deviations
_SHRUNK = 0.3
_LEAST = 1e-30


class ShapedSketch(Sketch):
    """In place of a gradient its size, a logarithm; how it lies to the weights; and its shape."""

    def __init__(self, shared: Tensors, length: int, generator: torch.Generator) -> None:
        super().__init__(shared, length, generator)
        self.weights = {name: value.detach().double().flatten() for name, value in shared.items()}

    @property
    def parts(self) -> dict[str, slice]:
        """Columns by what they tell: ``size``, ``weights`` (one a tensor), ``shape``."""
        behind = 1 + len(self.names)
        return {"size": slice(0, 1), "weights": slice(1, behind), "shape": slice(behind, None)}

    def __call__(self, gradients: Tensors) -> Tensor:
        """(N, 1 + tensors + shape)."""
        tensors = [gradients[name].double() for name in self.names]
        sizes = torch.stack([t.flatten(1).norm(dim=1) for t in tensors], dim=1)
        size = sizes.norm(dim=1, keepdim=True)
        along = [t.flatten(1) @ self.weights[n] for n, t in zip(self.names, tensors, strict=True)]
        lies = torch.stack(along, dim=1).abs() / size.clamp_min(_LEAST)
        parts = [_logarithm(size), _logarithm(lies), _logarithm(sizes / size.clamp_min(_LEAST))]
        for tensor, own in zip(tensors, sizes.T, strict=True):
            unit = tensor / own.clamp_min(_LEAST).view(-1, *[1] * (tensor.ndim - 1))
            flat = unit.flatten(1)
            parts += [_logarithm(flat.abs().sum(dim=1, keepdim=True))]
            parts += [_logarithm(flat.pow(4).sum(dim=1, keepdim=True))]
            if unit.ndim > 2:
                parts += _of_matrix(unit.flatten(2))
        return torch.cat(parts, dim=1)


def _of_matrix(unit: Tensor) -> list[Tensor]:
    """Of (N, rows, columns) at norm 1: the largest rows and columns, and how many count."""
    rows, columns = unit.norm(dim=2), unit.norm(dim=1)
    ranks = torch.linalg.matrix_norm(unit @ unit.transpose(1, 2))[:, None]
    ordered = [x.sort(dim=1, descending=True).values[:, :_LARGEST] for x in (rows, columns)]
    return [_logarithm(x) for x in (ranks, *ordered)]


def _logarithm(x: Tensor) -> Tensor:
    return x.clamp_min(_LEAST).log()


class Shapes:
    """How what a victim shows follows from what several shadows expect, within a class.

    Args:
        sides: Of public images by shadow, (shadows, M, k); a single one is the victim itself.
        labels: Of the images (M,).
    """

    def __init__(self, sides: Tensor, labels: Tensor) -> None:
        self.sides, self.labels = sides.double(), labels

    def score(self, seen: Tensor, labels: Tensor, candidates: Tensor) -> Tensor:
        """Log-likelihood, up to a constant, of candidates (T, K, shadows, k) given (T, k): (T, K).

        Normal, with the mean a ridge regression of one shadow on the mean of the others, and the
        covariance of what that leaves.
        """
        found = torch.empty(candidates.shape[:2], dtype=torch.float64)
        for label in labels.unique().tolist():
            mine = (labels == label).nonzero().flatten()
            known = self.sides[:, self.labels == label]
            mean, deviation = known.mean(dim=(0, 1)), known.flatten(0, 1).std(dim=0)

            def standard(x: Tensor, m: Tensor = mean, d: Tensor = deviation) -> Tensor:
                return ((x.double() - m) / d.clamp_min(1e-9)).clamp(-_LIMIT, _LIMIT)

            weights, precision = _regression(standard(known))
            missed = (
                standard(seen[mine])[:, None]
                - standard(candidates[mine].double().mean(dim=2)) @ weights
            )
            found[mine] = -torch.einsum("tki,ij,tkj->tk", missed, precision, missed)
        return found


def _regression(known: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and inverse covariance by which a shadow follows from the mean of the others."""
    count, _, size = known.shape
    one = torch.eye(size, dtype=known.dtype)
    if count == 1:
        return one, one
    others = (known.sum(dim=0) - known) / (count - 1)
    given, wanted = others.flatten(0, 1), known.flatten(0, 1)
    weights = torch.linalg.solve(given.T @ given + _SHRUNK * len(given) * one, given.T @ wanted)
    left = wanted - given @ weights
    covariance = left.T @ left / len(left)
    shrunk = (1 - _SHRUNK) * covariance + _SHRUNK * torch.diag(covariance.diag())
    return weights, torch.linalg.inv(shrunk + 1e-6 * one)
