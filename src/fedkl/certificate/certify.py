"""The certificate: directions and bits that updates give away when the secrets are unknown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fedkl.certificate.algebra import Information, Leftover, compressed
from fedkl.certificate.jacobians import Presented
from fedkl.certificate.prior import Prior
from fedkl.errors import AttackError, ConfigError
from fedkl.observation import Observation

TOLERANCE: Final = 1e-6
# Squares of singular values are kept: below this, rounding is all there is.
_FINEST: Final = 1e-7
_RIDGE: Final = 1e-2
LARGEST: Final = 1.2e9
"""Numbers that one certificate may hold in memory at once (8 bytes each)."""


class TooLargeError(ConfigError):
    """The matrices of a certificate would not fit into memory."""


@dataclass(frozen=True)
class Certificate:
    """What ``presentations`` images give away under one set of secrets.

    Attributes:
        directions: Identified directions when the secrets are unknown: singular values of the
            projected Jacobian above ``tolerance``, every update in units of its own: 1 is the
            largest of its unprojected one.
        known: The same when the secrets are known.
        of: Pixels of all images together.
        tolerance: See above. A change of the secrets that cancels an image's change counts as long
            as it is at most 100 prior deviations per prior deviation of the image.
        spectrum: The singular values in these units.
        bits: Bits about the images when the secrets are unknown, under the prior.
        bits_known: The same when the secrets are known.
        noise: Standard deviation of the noise that ``bits`` assumes on every observed number.
        prior: Under which ``bits`` are.
        secrets: Private numbers.
        values: Observed numbers per update.
        updates: Number of updates, T.
        presentations: Images times steps of all updates.
    """

    directions: int
    known: int
    of: int
    tolerance: float
    spectrum: tuple[float, ...]
    bits: float
    bits_known: float
    noise: float
    prior: Prior
    secrets: int
    values: int
    updates: int
    presentations: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; singular values with four digits."""
        data = asdict(self)
        data["spectrum"] = [float(f"{value:.3e}") for value in self.spectrum]
        return data


def certify(
    observation: Observation,
    images: Tensor,
    labels: Tensor,
    secrets: Mapping[str, Tensor],
    *,
    prior: Prior,
    updates: Iterable[int] | None = None,
    tolerance: float = TOLERANCE,
    progress: Callable[[int, int], None] | None = None,
) -> list[Certificate]:
    """How much of the images the first 1, 2, ... T updates give away, to first order at the truth.

    J_x and J_s are the derivatives of what was seen by images and secrets. A direction of image
    space is identified if no change of the secrets cancels it: J_x, projected on the complement of
    range(J_s), keeps it. Bits are ½·log det(I + J_x Σ_x J_xᵀ (J_s Σ_s J_sᵀ + noise² I)⁻¹). This is
    about every attack that starts near the truth with the law of the secrets; nothing is said
    about what follows from far away, or about what an attacker knows of images beforehand.

    Args:
        observation: One victim with T updates under one set of secrets; running statistics that
            were sent count as seen.
        images: The true images (T, images, C, H, W).
        labels: The true labels (T, images).
        secrets: The true secrets by name.
        prior: How far pixels and secrets spread.
        updates: Numbers of updates to certify, each at most T; all of them if None.
        tolerance: Singular values below this times the largest of an update count as zero; at least
            1e-7.
        progress: Called with updates done and to do.

    Returns:
        One certificate per number of updates, ascending.

    Raises:
        ConfigError: ``tolerance`` or ``updates`` is out of range.
        TooLargeError: The matrices would not fit into memory.
        AttackError: As :class:`fedkl.certificate.jacobians.Presented`.
    """
    wanted = _wanted(observation, updates)
    check_tolerance(tolerance)
    presented = Presented(observation, images, labels, secrets)
    check_size(presented.inputs, len(presented.secrets), presented.values, wanted[-1])
    found, state = [], _Growing(presented, prior, tolerance)
    for t in range(wanted[-1]):
        state.add(t)
        if t + 1 in wanted:
            found.append(state.certificate(observation.training.presentations))
        if progress is not None:
            progress(t + 1, wanted[-1])
    return found


class _Growing:
    """Both computations, one update after the other."""

    def __init__(self, presented: Presented, prior: Prior, tolerance: float) -> None:
        self._presented, self._prior, self._tolerance = presented, prior, tolerance
        missing = [name for name in presented.names if name not in prior.secrets]
        if missing:
            raise ConfigError(
                f"the prior says nothing about {missing[0]}; make it with prior_of(spec, secrets)."
            )
        named = presented.named(torch.ones_like(presented.secrets))
        widths = [prior.secrets[name] * value.flatten() for name, value in named.items()]
        self._widths = torch.cat(widths) if widths else presented.secrets
        start = presented.seen(0, presented.images[0], presented.secrets)
        self._noise = prior.noise * float(start.square().mean().sqrt())
        self._alone: list[Tensor] = []
        self._leftover = Leftover(len(self._widths), _RIDGE * tolerance)
        self._information = Information(len(self._widths), self._noise)

    def add(self, t: int) -> None:
        """The ``t``-th update."""
        by_secrets = self._presented.by_secrets(t) * self._widths
        by_inputs = self._presented.by_inputs(t) * self._prior.pixel
        by_secrets, by_inputs = compressed(by_secrets, by_inputs)
        alone = torch.linalg.svdvals(by_inputs)
        largest = float(alone.max())
        if not largest > 0 and not self._alone:
            raise AttackError(
                "the update does not depend on the image at all; is it the gradient of a "
                "model that has collapsed?"
            )
        # In units of its own, which change no direction: beside a large update all of a small one,
        # as of an image that the model is sure of, would count as nothing. Noise has no such units.
        unit = largest if largest > 0 else 1.0
        self._alone.append(alone / unit)
        self._leftover.add(by_secrets / unit, by_inputs / unit)
        self._information.add(by_secrets, by_inputs)

    def certificate(self, presentations: int) -> Certificate:
        """What the updates so far give away; ``presentations`` is what one of them holds."""
        alone, spectrum = torch.cat(self._alone), self._leftover.spectrum()
        updates = len(self._alone)
        return Certificate(
            directions=int((spectrum > self._tolerance).sum()),
            known=int((alone > self._tolerance).sum()),
            of=updates * self._presented.inputs,
            tolerance=self._tolerance,
            spectrum=tuple(spectrum.tolist()),
            bits=self._information.bits(),
            bits_known=self._information.bits_known(),
            noise=self._noise,
            prior=self._prior,
            secrets=len(self._widths),
            values=self._presented.values,
            updates=updates,
            presentations=updates * presentations,
        )


def _wanted(observation: Observation, updates: Iterable[int] | None) -> list[int]:
    every = range(1, observation.count + 1)
    wanted = sorted(set(every if updates is None else updates))
    if not wanted or wanted[0] < 1 or wanted[-1] > observation.count:
        raise ConfigError(
            f"the numbers of updates must be from 1 to {observation.count}, as many as the "
            f"observation has, got {wanted}."
        )
    return wanted


def check_tolerance(tolerance: float) -> None:
    """Raises unless ``tolerance`` is at least 1e-7 and below 1.

    Raises:
        ConfigError: It is not; for those who have something to make before :func:`certify`.
    """
    if not _FINEST <= tolerance < 1:
        raise ConfigError(
            f"tolerance must be from {_FINEST} to 1, got {tolerance}: squares of singular values "
            "in float64 tell no more."
        )


def check_size(inputs: int, secrets: int, values: int, updates: int) -> None:
    """Raises if a dense certificate of this size would need more memory than is sensible.

    Raises:
        TooLargeError: It would; the message says what to make smaller.
    """
    rows = min(values, inputs + secrets)
    jacobians = 2 * values * (inputs + secrets) + 4 * secrets**2
    growing = (secrets + rows) * inputs * updates * 2 + 3 * (inputs * updates) ** 2
    if jacobians + growing > LARGEST:
        raise TooLargeError(
            f"a certificate over {updates} update(s) of {inputs} pixels, {values} observed numbers "
            f"and {secrets} secrets takes {8 * (jacobians + growing) / 1e9:.0f} GB; take fewer "
            "presentations, smaller images or fewer locks, or the check of one cancellation."
        )
