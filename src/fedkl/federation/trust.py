"""What a client can see of a server that sends weights of its own making.

A check on tensors alone, without false hopes: it finds the clumsy ways (zeroed classifier rows,
biases far off, rows that repeat each other, sudden jumps), not a server that takes its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")
# Rows of trained layers differ in norm by small factors; crafted ones by orders of magnitude.
ROW_FACTOR: Final = 100.0
# Nats (in units of the features) by which a trained classifier's bias never differs from the rest.
BIAS_LIMIT: Final = 10.0
# Cosine above which two rows are one, and the share of such rows that is no accident.
SAME: Final = 0.9999
SAME_SHARE: Final = 0.25
# A round moves a tensor by less than this many times its own size plus a constant.
JUMP_FACTOR: Final = 10.0
JUMP_FLOOR: Final = 1.0


def suspicious(before: Mapping[str, Tensor] | None, received: Mapping[str, Tensor]) -> list[str]:
    """Warnings, in words, about a global state that a client received.

    Args:
        before: The global state of the round before; None in a client's first round.
        received: The global state just received.

    Returns:
        One sentence per finding, the worst kind first; empty for an ordinary state. Tensors of
        other shapes than before are not compared (loading them is an error of its own).
    """
    floats = {n: t.detach() for n, t in received.items() if t.is_floating_point()}
    broken = [n for n, t in floats.items() if not bool(torch.isfinite(t).all())]
    found = [f"{name} holds NaN or infinity." for name in broken]
    fine = {
        n: t.float()
        for n, t in floats.items()
        if n not in broken and not n.endswith(STATISTICS) and t.numel() > 0
    }
    for name, tensor in fine.items():
        if tensor.ndim >= 2 and len(tensor) >= 4:
            found += _repeated(name, tensor.flatten(1))
    found += _classifier(fine)
    for name, tensor in fine.items():
        old = None if before is None else before.get(name)
        if old is not None and old.shape == tensor.shape:
            found += _jumped(name, old.detach().float(), tensor)
    return found


def _classifier(state: Mapping[str, Tensor]) -> list[str]:
    """The last matrix with a bias of its length decides what each class's images send back."""
    pairs = [
        (n, b)
        for n in state
        if n.endswith("weight")
        and state[n].ndim == 2
        and (b := n.removesuffix("weight") + "bias") in state
        and state[b].shape == state[n].shape[:1]
    ]
    if not pairs or len(state[pairs[-1][0]]) < 2:
        return []
    weight, bias = pairs[-1]
    found = []
    norms = state[weight].norm(dim=1)
    middle, most = float(norms.median()), float(norms.max())
    gone = int((norms * ROW_FACTOR < most).sum())
    if gone and middle * ROW_FACTOR < most:
        found.append(
            f"{weight}: {gone} of {len(norms)} rows have all but vanished beside the largest "
            f"(norm {most:.3g}): the update would show the images of the other classes alone."
        )
    elif gone:
        found.append(
            f"{weight}: {gone} of {len(norms)} rows have all but vanished: images of those "
            "classes would stand out."
        )
    values = state[bias]
    off = (values - values.median()).abs()
    if float(off.max()) > max(BIAS_LIMIT, 5 * float(off.median())):
        row = int(off.argmax())
        found.append(
            f"{bias}: entry {row} is {float(values[row]):.3g}, the others are around "
            f"{float(values.median()):.3g}: images of that class would stand out."
        )
    return found


def _repeated(name: str, rows: Tensor) -> list[str]:
    """Many equal (or opposite) rows bin inputs by one measurement: imprinting (Fowl et al. 2022).

    Rows are ordered by one random projection; equal ones are then neighbors. Linear in the size.
    """
    norms = rows.norm(dim=1)
    rows = rows[norms > 0] / norms[norms > 0][:, None]
    if len(rows) < 4 or rows.shape[1] < 4:
        return []  # of few short rows some are alike by chance
    # Any fixed direction does; powers of the golden ratio's fraction have no pattern in common.
    index = torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype)
    rows = rows * (rows @ torch.frac(index * 0.6180339887)).sign()[:, None]
    order = rows @ torch.frac(index * 0.7548776662 + 0.3)
    near = rows[order.argsort()]
    same = (near[1:] * near[:-1]).sum(dim=1) > SAME
    share = float(same.float().mean())
    if share < SAME_SHARE:
        return []
    return [
        f"{name}: {int(same.sum()) + 1} of {len(norms)} rows point the same way: such a layer "
        "sorts images into bins and returns one per bin (imprinting)."
    ]


def _jumped(name: str, old: Tensor, new: Tensor) -> list[str]:
    size = float(old.square().mean().sqrt())
    change = float((new - old).square().mean().sqrt())
    if change <= JUMP_FACTOR * size + JUMP_FLOOR:
        return []
    return [
        f"{name} moved by {change:.3g} (root mean square) since the last round, having been "
        f"{size:.3g} before: no round of training does that."
    ]
