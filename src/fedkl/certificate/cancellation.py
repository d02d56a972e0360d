"""The zero of a pad shown by construction, for networks whose Jacobian by the secrets is too large.

For every direction v of image space, moving the first lock's shift by δβ = −γ ⊙ D(norm∘stem)·v
leaves γ ⊙ norm(stem(x)) + β where it was. If that lock cuts every path from the image to what is
shared, nothing that is observed changes; and to the image x' of any other picture belongs a shift
β' under which the update is the same to the last digit. Shared running statistics of that lock's
norm are such a path: no shift reaches them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fedkl.certificate.jacobians import Presented, pushed
from fedkl.certificate.prior import Prior
from fedkl.errors import AttackError, number_of
from fedkl.locking.insertion import INSERTED_NAME
from fedkl.observation import Observation


@dataclass(frozen=True)
class Cancellation:
    """How well shifts of the first lock cancel changes of the image, in one update.

    Attributes:
        directions: Random directions tried.
        remaining: Largest ‖change of the update with the shift moved along‖ / ‖the same with the
            shift held‖ over them; 0 up to rounding (about 1e-14) if the first lock cuts every path.
        swapped: ‖update of another picture under its own shift − update seen‖ / ‖update of that
            picture under the true shift − update seen‖: the same for a change of any size.
        shift: Root mean square of δβ for a direction in which every pixel moves by its prior
            deviation, in prior deviations of β. What the shift's law gives away grows with it.
        nats: Logarithm of how much less likely that other picture's shift is than the true one
            under the prior, stem and γ held at their true values: at most so much is left to
            whoever knows both. Negative: more likely.
        secrets: Private numbers; none of their derivatives is stored.
    """

    directions: int
    remaining: float
    swapped: float
    shift: float
    nats: float
    secrets: int

    @property
    def cut(self) -> bool:
        """Whether the first lock hides every change of one image, up to rounding."""
        return self.remaining < 1e-9 and self.swapped < 1e-9

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "cut": self.cut}


def cancellation(
    observation: Observation,
    images: Tensor,
    labels: Tensor,
    secrets: Mapping[str, Tensor],
    other: Tensor,
    *,
    prior: Prior,
    generator: torch.Generator,
    directions: int = 8,
) -> Cancellation:
    """Whether the first pad hides one image, by construction. Needs memory for one gradient only.

    Args:
        observation: One victim of scheme ``pad`` with one update of one image.
        images: The true image (1, 1, C, H, W).
        labels: Its label (1, 1).
        secrets: The true secrets by name.
        other: Another picture (C, H, W).
        prior: For the figures ``shift`` and ``nats``.
        generator: For the directions.
        directions: How many are tried.

    Raises:
        AttackError: The lock has no β per position, or the update holds several images: they share
            one β, which cannot cancel changes of all of them.
    """
    if observation.count != 1 or observation.training.presentations != 1:
        raise AttackError(
            f"got {number_of(observation.count, 'update')} of "
            f"{number_of(observation.training.presentations, 'presentation')}; one shift cancels "
            "the changes of one image in one step. Take batch 1, one step and one update."
        )
    presented = Presented(observation, images, labels, secrets)
    pad = _FirstPad(observation, presented)
    x, s = presented.images[0], presented.secrets
    shape = (directions, *x.shape)
    tangents = torch.randn(shape, generator=generator, dtype=x.dtype)
    tried = [pad.tangent(v) for v in tangents]
    width = prior.secrets[pad.shift_name]
    move = torch.stack([delta for delta, _ in tried]).square().mean().sqrt()
    swapped, moved = pad.swapped(other.double()[None])
    before = presented.named(s)[pad.shift_name]
    gap = (before + moved).square().sum() - before.square().sum()
    return Cancellation(
        directions=directions,
        remaining=max(left for _, left in tried),
        swapped=swapped,
        shift=prior.pixel * float(move) / width,
        nats=float(gap) / (2 * width**2),
        secrets=len(s),
    )


class _FirstPad:
    """The lock that runs first, in the model of the attacker."""

    def __init__(self, observation: Observation, presented: Presented) -> None:
        spec = observation.spec or {}
        names = set(presented.names)
        site = spec["sites"][0]["name"] if spec.get("sites") else ""
        self.site = site
        self.scale_name, self.shift_name = f"{site}.keylock.gamma", f"{site}.keylock.beta"
        self.presented = presented
        if spec.get("scheme") not in ("pad", "open-pad") or self.shift_name not in names:
            raise AttackError(
                f"the lock is of scheme {spec.get('scheme')!r}; only a pad has a shift per "
                "position that can cancel a change of the image. Use certify for others."
            )

    def normalized(self, x: Tensor) -> Tensor:
        """What the first lock's norm puts out before γ and β: (images, *positions)."""
        network = self.presented.network
        caught: list[Tensor] = []
        # Around a norm that was inserted, for it may run over rows of what comes out.
        behind = self.site.removesuffix(INSERTED_NAME).removesuffix(".")
        module = network.model.get_submodule(behind)
        hook = module.register_forward_hook(lambda _m, _args, out: caught.append(out))
        named = self.presented.named(self.presented.secrets)
        neutral = {
            self.scale_name: torch.ones_like(named[self.scale_name]),
            self.shift_name: torch.zeros_like(named[self.shift_name]),
        }
        everything = {**network.shared, **named, **neutral}
        try:
            network.logits(everything, x)
        finally:
            hook.remove()
        return caught[0]

    def tangent(self, v: Tensor) -> tuple[Tensor, float]:
        """The δβ for direction ``v``, and the share of the update's change that it leaves."""
        presented = self.presented
        x, s = presented.images[0], presented.secrets
        along = pushed(self.normalized, (x,), (v,))[0]
        delta = -presented.named(s)[self.scale_name] * along

        def change(moved: Tensor) -> float:
            seen = functools.partial(presented.seen, 0)
            return float(pushed(seen, (x, s), (v, self._flat(moved))).norm())

        held = change(torch.zeros_like(delta))
        return delta, change(delta) / held if held > 0 else math.inf

    def swapped(self, other: Tensor) -> tuple[float, Tensor]:
        """The share of the difference to another picture's update that its shift leaves."""
        presented = self.presented
        x, s = presented.images[0], presented.secrets
        apart = self.normalized(x) - self.normalized(other)
        delta = presented.named(s)[self.scale_name] * apart[0]
        seen = presented.seen(0, x, s)
        held = float((presented.seen(0, other, s) - seen).norm())
        left = float((presented.seen(0, other, s + self._flat(delta)) - seen).norm())
        return left / held if held > 0 else math.inf, delta

    def _flat(self, shift: Tensor) -> Tensor:
        zeros = self.presented.named(torch.zeros_like(self.presented.secrets))
        parts = {**zeros, self.shift_name: shift}
        return torch.cat([part.flatten() for part in parts.values()])
