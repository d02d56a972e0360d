"""The attack × defense matrix: its columns, rows and cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedkl.report.audit.facts import Audit, Summary
from fedkl.report.audit.plots import Strip, strip, strip_scale
from fedkl.report.audit.words import defense_name, threat_name

KEY_HOLDER: Final = "key-shared"
_CONTROLS_FIRST: Final = ("none", "norm", "fedbn")

Variant = tuple[str, str, int | None, int | None, int | None, int | None]
"""attack, stage, batch, steps, observations, presentations: what a row of the matrix stands for."""


@dataclass(frozen=True)
class Column:
    """One defense under one threat model, in the place and color it has all over the page.

    Attributes:
        color: Index of the color of its curves, one for each defense.
        dash: Index of their dashes, one for each threat under the same defense.
        control: Whether it is there for comparison only.
    """

    defense: str
    threat: str
    title: str
    subtitle: str
    color: int
    dash: int
    control: bool

    @property
    def name(self) -> str:
        """Title and subtitle in one."""
        return f"{self.title}, {self.subtitle}" if self.subtitle else self.title


@dataclass(frozen=True)
class Cell:
    """One summary and its ink.

    ``heat`` in [0, 1] grows with what the attack has beyond the floor, in advantage (0.5 is all) or
    identification (1 is), whichever is more; ``cool``: next to nothing in both.
    """

    summary: Summary
    strip: Strip | None
    heat: float
    cool: bool


@dataclass(frozen=True)
class Line:
    """One row of the matrix; a cell is None where nothing was measured."""

    attack: str
    notes: Sequence[str]
    cells: Sequence[Cell | None]


@dataclass(frozen=True)
class Matrix:
    """Rows in the order of the audit; ``constant`` tells what is the same in all of them."""

    columns: Sequence[Column]
    lines: Sequence[Line]
    constant: Sequence[str]


def columns(audit: Audit) -> list[Column]:
    """Every defense under every threat: undefended, the other controls, then the defenses.

    Within a defense the key holder comes last, all else as it comes in the audit.
    """
    pairs = [(one.defense, one.threat) for one in audit.summaries]
    pairs += [(one.defense, one.threat) for one in audit.pictures]
    pairs = list(dict.fromkeys(pairs))
    order = {name: place for place, name in enumerate(_CONTROLS_FIRST)}
    for judgment in audit.judgments:
        order.setdefault(judgment.defense, len(order))
    for defense, _ in pairs:
        order.setdefault(defense, len(order))
    pairs.sort(key=lambda pair: (order[pair[0]], pair[1] == KEY_HOLDER))
    return [_column(audit, pairs, place) for place in range(len(pairs))]


def _column(audit: Audit, pairs: Sequence[tuple[str, str]], place: int) -> Column:
    defense, threat = pairs[place]
    control = defense in audit.controls or threat in audit.controls
    lone = sum(name == defense for name, _ in pairs) == 1
    return Column(
        defense=defense,
        threat=threat,
        title=defense_name(defense),
        # What holds no key has no key to know: the threat says nothing unless there are several.
        subtitle="" if defense in _CONTROLS_FIRST and lone else threat_name(threat),
        color=list(dict.fromkeys(name for name, _ in pairs)).index(defense) % 8,
        dash=sum(name == defense for name, _ in pairs[:place]) % 4,
        control=control,
    )


def matrix(audit: Audit, order: Sequence[Column]) -> Matrix:
    """The matrix of all summaries."""
    scale = strip_scale(
        [x for one in audit.summaries for x in (one["advantage"].low, one["advantage"].high)]
        + [x for found in audit.advantages.values() for x in found]
    )
    found: dict[Variant, dict[tuple[str, str], Cell]] = {}
    for one in audit.summaries:
        attack, defense, threat, stage, batch, steps, observations, presentations = one.cell
        variant = (attack, stage, batch, steps, observations, presentations)
        ink = strip(one["advantage"], audit.advantages.get(one.cell, ()), scale)
        found.setdefault(variant, {})[defense, threat] = _cell(one, ink)
    notes = [_notes(variant) for variant in found]
    fixed = [len(set(column)) == 1 for column in zip(*notes, strict=True)]
    lines = [
        Line(
            attack=variant[0],
            notes=[text for text, same in zip(note, fixed, strict=True) if text and not same],
            cells=[cells.get((column.defense, column.threat)) for column in order],
        )
        for (variant, cells), note in zip(found.items(), notes, strict=True)
    ]
    first = zip(notes[0], fixed, strict=True) if notes else ()
    return Matrix(order, lines, [text for text, same in first if text and same])


def _cell(summary: Summary, ink: Strip | None) -> Cell:
    mean = summary["advantage"].mean
    if mean is None:
        return Cell(summary, ink, 0.0, False)
    found, guessed = summary["identified"].mean, summary["floor_identified"].mean
    more = 0.0 if found is None else found - (guessed or 0.0)
    # The root spreads the small figures, on which verdicts turn; half an SSIM is all there is.
    return Cell(summary, ink, min(max(mean / 0.5, more, 0.0), 1.0) ** 0.5, max(mean, more) <= 0.02)


def _notes(variant: Variant) -> list[str]:
    _, stage, batch, steps, observations, presentations = variant
    counts = [
        ("batch", batch),
        ("local steps", steps),
        ("observations", observations),
        ("presentations", presentations),
    ]
    return [
        f"{stage} model" if stage else "",
        *("" if count is None else f"{name} {count}" for name, count in counts),
    ]
