"""Certificates for what a federation's clients send: the truth comes from the audit's victims."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fedkl.audit.config import AuditConfig
from fedkl.audit.observe import observe
from fedkl.audit.victims import Victims
from fedkl.certificate import (
    TOLERANCE,
    Cancellation,
    Certificate,
    Prior,
    TooLargeError,
    cancellation,
    certify,
    prior_of,
)
from fedkl.certificate.prior import NOISE, PIXEL
from fedkl.errors import AttackError
from fedkl.files import read_json, write_json
from fedkl.locking import OpenPad, Pad
from fedkl.observation import THREATS
from fedkl.rng import derive

LARGEST_IN_AUDIT: Final = 3_000


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
        """A line per number of presentations, or one that says what the construction shows."""
        check = self.cancellation
        hidden = None if check is None else check.cut
        lines: list[dict[str, Any]] = [
            {
                "defense": self.defense,
                "presentations": one.presentations,
                "directions": one.directions,
                "directions_key_known": one.known,
                "pixels": one.of,
                "bits": round(one.bits, 2),
                "bits_key_known": round(one.bits_known, 2),
                "secrets": one.secrets,
                "first_lock_hides_one_image": hidden,
            }
            for one in self.certificates
        ]
        names = ("directions", "directions_key_known", "pixels", "bits", "bits_key_known")
        return lines or [
            {
                "defense": self.defense,
                "presentations": 1,
                **dict.fromkeys(names),
                "secrets": None if check is None else check.secrets,
                "first_lock_hides_one_image": hidden,
            }
        ]


def certify_victims(
    victims: Victims,
    rows: Tensor,
    *,
    updates: Sequence[int] | None = None,
    tolerance: float = TOLERANCE,
    pixel: float = PIXEL,
    noise: float = NOISE,
    largest: float = math.inf,
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
    if victims.training.noise:
        raise AttackError(
            f"got updates {victims.training.altered}; a certificate counts what exact updates give "
            "away. Certify the defense without noise, or with --noise-multiplier 0."
        )
    (observation,) = observe(victims, [victims.send(rows)], THREATS["adaptive"])
    images = torch.stack([victims.bundle.test.batch(row)[0] for row in rows])
    labels = torch.stack([victims.bundle.test.labels[row] for row in rows])
    held = victims.held()
    prior = prior_of(victims.spec, held, pixel=pixel, noise=noise)
    certificates, note = [], ""
    private = sum(value.numel() for value in held.values())
    options: dict[str, Any] = {"updates": updates, "tolerance": tolerance, "progress": progress}
    try:
        if private > largest:
            raise TooLargeError(f"{private} private numbers are more than {largest:g}.")
        certificates = certify(observation, images, labels, held, prior=prior, **options)
    except TooLargeError as error:
        note = str(error)
    name, cancelled = victims.config.defense.name, _cancelled(victims, rows[:1], held, prior)
    return Certified(name, victims.audit.stage, tuple(certificates), cancelled, note)


def _cancelled(
    victims: Victims, rows: Tensor, held: Mapping[str, Tensor], prior: Prior
) -> Cancellation | None:
    """The construction for one image and the one behind it in the test set; None without a pad."""
    padded = victims.spec is not None and victims.spec.scheme in (Pad.name, OpenPad.name)
    if not padded or victims.training.presentations != 1:
        return None
    (observation,) = observe(victims, [victims.send(rows)], THREATS["adaptive"])
    test = victims.bundle.test
    images, labels = test.batch(rows[0])
    other, _ = test.batch((rows[0] + 1) % len(test))
    return cancellation(
        observation,
        images[None],
        labels[None],
        held,
        other[0],
        prior=prior,
        generator=derive(victims.config.seed, "cancellation"),
    )


def certify_audit(
    audit: AuditConfig,
    victims: Iterable[Victims],
    rows: Tensor,
    folder: Path,
) -> dict[str, Any]:
    """The entry ``certificate`` of an audit's JSON: one image of the first victim per defense.

    Where a defense has more than 3,000 private numbers, only the construction is tried: the whole
    matrix is for ``fedkl certify``, which has all the time it takes.

    Args:
        audit: The audit.
        victims: A client of every defense.
        rows: Test images (victims, T, images), as :func:`fedkl.audit.victims.draw_victims`.
        folder: Of the cells; what is there is not done again.
    """
    lines: list[dict[str, Any]] = []
    for one in victims:
        path = folder / f"certificate_{audit.stage}_{one.config.defense.name}.json"
        if path.exists():
            lines += read_json(path)
            continue
        lines += (found := _lines(one, rows[0, :1]))
        write_json(path, found)
    return {"tolerance": TOLERANCE, "pixel": PIXEL, "noise": NOISE, "defenses": lines}


def _lines(victims: Victims, rows: Tensor) -> list[dict[str, Any]]:
    try:
        found = certify_victims(victims, rows, largest=LARGEST_IN_AUDIT)
    except AttackError:  # an image whose gradient vanishes: the audit goes on without its line
        found = Certified(victims.config.defense.name, victims.audit.stage, (), None)
    return found.rows()
