"""Certificates for what a federation's clients send: the truth comes from the audit's victims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkl.audit.observe import observe
from fedkl.audit.victims import Victims
from fedkl.certificate import (
    TOLERANCE,
    Cancellation,
    Certificate,
    cancellation,
    certify,
    prior_of,
)
from fedkl.certificate.prior import NOISE, PIXEL
from fedkl.errors import ConfigError
from fedkl.locking import OpenPad, Pad
from fedkl.observation import THREATS
from fedkl.rng import derive


@dataclass(frozen=True)
class Certified:
    """What is certified of one defense.

    Attributes:
        defense: Its name.
        stage: Which global model the victims started from.
        certificates: One per number of presentations; empty where the matrices would not fit.
        cancellation: Of a pad at batch 1, the zero shown by construction.
        note: Why there are no certificates, or "".
    """

    defense: str
    stage: str
    certificates: tuple[Certificate, ...]
    cancellation: Cancellation | None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, spectra included."""
        return {
            "defense": self.defense,
            "stage": self.stage,
            "certificates": [one.to_dict() for one in self.certificates],
            "cancellation": None if self.cancellation is None else self.cancellation.to_dict(),
            "note": self.note,
        }

    def rows(self) -> list[dict[str, Any]]:
        """A line per number of presentations, for tables."""
        return [
            {
                "defense": self.defense,
                "presentations": one.presentations,
                "directions, secrets unknown": one.directions,
                "directions, secrets known": one.known,
                "of pixels": one.of,
                "bits, secrets unknown": round(one.bits, 2),
                "bits, secrets known": round(one.bits_known, 2),
                "private numbers": one.secrets,
            }
            for one in self.certificates
        ]


def certify_victims(
    victims: Victims,
    rows: Tensor,
    *,
    updates: Sequence[int] | None = None,
    tolerance: float = TOLERANCE,
    pixel: float = PIXEL,
    noise: float = NOISE,
    largest: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Certified:
    """Certifies what one client sends of the test images ``rows``.

    Args:
        victims: The client.
        rows: Test images behind every update, (T, images of an update).
        updates: Numbers of updates to certify; 1 to T if None.
        tolerance: As in :func:`fedkl.certificate.certify`.
        pixel: Prior deviation of a pixel.
        noise: Noise on the update, as a fraction of its root mean square.
        largest: Private numbers beyond which the matrices are not even tried.
        progress: Called with updates done and to do.

    Raises:
        ConfigError: A number is out of range.
        AttackError: The model does not give what the client sent.
    """
    (observation,) = observe(victims, [victims.send(rows)], THREATS["adaptive"])
    images = torch.stack([victims.bundle.test.batch(row)[0] for row in rows])
    labels = torch.stack([victims.bundle.test.labels[row] for row in rows])
    held = victims.held()
    prior = prior_of(victims.spec, held, pixel=pixel, noise=noise)
    certificates: list[Certificate] = []
    note = ""
    private = sum(value.numel() for value in held.values())
    if largest is not None and private > largest:
        note = f"{private} private numbers are too many for a matrix here: not certified densely"
    else:
        try:
            certificates = certify(
                observation,
                images,
                labels,
                held,
                prior=prior,
                updates=updates,
                tolerance=tolerance,
                progress=progress,
            )
        except ConfigError as error:
            if "GB" not in str(error):
                raise
            note = str(error)
    padded = victims.spec is not None and victims.spec.scheme in (Pad.name, OpenPad.name)
    cancelled = None
    if padded and victims.training.presentations == 1:
        (first,) = observe(victims, [victims.send(rows[:1])], THREATS["adaptive"])
        other = int((rows[0, 0] + 1) % len(victims.bundle.test))
        cancelled = cancellation(
            first,
            images[:1],
            labels[:1],
            held,
            victims.bundle.test.batch(torch.tensor([other]))[0][0],
            prior=prior,
            generator=derive(victims.config.seed, "cancellation"),
        )
    name = victims.config.defense.name
    return Certified(name, victims.audit.stage, tuple(certificates), cancelled, note)
