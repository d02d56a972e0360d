"""What ``audit.json`` says, as frozen data: everything optional is there, possibly as None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Cell = tuple[str, str, str, str, int | None, int | None, int | None, int | None]
"""attack, defense, threat, stage, batch, steps, observations, presentations of a mean."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, any of them possibly unknown."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Summary:
    """One cell of the grid: an attack on a defense under a threat model, over ``n`` victims.

    Attributes:
        cell: What identifies it.
        control: Whether it is there for comparison only, so that no verdict follows from it.
        n: Victims, of one update or several each.
        figures: Metric → interval, e.g. ``ssim``, ``advantage``, ``floor_identified``.
        works: Metric → whether this attack beats the floor in it where nothing stops it.
        verdict: ``leaks``, ``holds``, ``inconclusive`` or "" where there is none.
        reason: One sentence.
    """

    cell: Cell
    control: bool
    n: int | None
    figures: Mapping[str, Interval]
    works: Mapping[str, bool]
    verdict: str
    reason: str

    def __getitem__(self, metric: str) -> Interval:
        """The interval of a metric; unknown figures are an interval of nothing."""
        return self.figures.get(metric, Interval())

    @property
    def attack(self) -> str:
        """The attack's id."""
        return self.cell[0]

    @property
    def defense(self) -> str:
        """The defense's id."""
        return self.cell[1]

    @property
    def threat(self) -> str:
        """The name of the threat model."""
        return self.cell[2]


@dataclass(frozen=True)
class Picture:
    """One victim and one reconstruction of it; paths are relative to the audit's folder.

    Attributes:
        sprite: Path of the frames side by side, or "".
        iterations: Of each frame.
        losses: The attack's own loss at each frame.
        ssims: SSIM against the truth at each frame.
    """

    attack: str
    defense: str
    threat: str
    stage: str
    victim: tuple[str, str]
    label: str
    ssim: float | None
    identified: bool | None
    truth: str
    floor: str
    reconstruction: str
    sprite: str
    frames: int
    iterations: Sequence[float | None]
    losses: Sequence[float | None]
    ssims: Sequence[float | None]


@dataclass(frozen=True)
class Judgment:
    """The verdict on one defense; ``worst`` is the cell that decided it, if one did."""

    defense: str
    verdict: str
    reason: str
    worst: Summary | None


@dataclass(frozen=True)
class Audit:
    """All of ``audit.json``.

    Attributes:
        advantages: One number an image, for the cells that have rows.
        caveats: What weakens the audit, in sentences.
        candidates: Images of a class among which the true one was to be found.
        skipped: What was asked for and not done (cells, and single victims of others), and why.
    """

    overall: str
    judgments: Sequence[Judgment]
    summaries: Sequence[Summary]
    advantages: Mapping[Cell, Sequence[float]]
    pictures: Sequence[Picture]
    threats: Mapping[str, Mapping[str, Any]]
    accuracy: Mapping[str, Mapping[str, float | None]]
    skipped: Sequence[tuple[str, str]]
    caveats: Sequence[str]
    candidates: int
    controls: Sequence[str]
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    command: str
    data: str
    cost: str
    certificate: Any
