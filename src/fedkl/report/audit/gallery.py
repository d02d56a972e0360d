"""Which pictures stand where: beside the verdict, in the galleries, under the slider."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final

from fedkl.report.audit.facts import Audit, Judgment, Picture, Summary
from fedkl.report.audit.grid import Column
from fedkl.report.audit.pictures import Album, Embedded
from fedkl.report.audit.plots import Chart, Curve, chart
from fedkl.report.audit.words import THREATS, threat_name

FILM_BYTES: Final = 500_000
"""Beyond so many bytes of frames no further film is added to a page."""


@dataclass(frozen=True)
class Tile:
    """One reconstruction with its figures; ``image`` is None if the file cannot be shown."""

    column: Column
    image: Embedded | None
    ssim: float | None
    identified: bool | None


@dataclass(frozen=True)
class Victim:
    """A true image, the floor's guess, and a tile (or None) for every column of its gallery."""

    label: str
    note: str
    truth: Embedded | None
    floor: Embedded | None
    tiles: Sequence[Tile | None]


@dataclass(frozen=True)
class Gallery:
    """What one attack made of several victims."""

    attack: str
    columns: Sequence[Column]
    victims: Sequence[Victim]


@dataclass(frozen=True)
class Hero:
    """A verdict with the picture that shows it: the victim of median SSIM in the deciding cell."""

    judgment: Judgment
    threat: str
    words: str
    victim: Victim | None
    tile: Tile | None


@dataclass(frozen=True)
class Track:
    """The frames of one reconstruction, ``frame_width`` pixels each, and the figures of each."""

    column: Column
    sprite: Embedded
    frames: int
    frame_width: float
    iterations: Sequence[float | None]
    losses: Sequence[float | None]
    ssims: Sequence[float | None]


@dataclass(frozen=True)
class Film:
    """All tracks of one attack on one victim; ``steps`` are those of the slider."""

    attack: str
    victim: Victim
    tracks: Sequence[Track]
    steps: Sequence[float]
    loss: Chart | None
    ssim: Chart | None


_Place = tuple[str, str]


class _Notes:
    """Which victim a picture is of, in no more words than it takes to tell them apart."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self._staged = len({one.stage for one in pictures}) > 1
        self._seeded = len({one.victim[1] for one in pictures}) > 1

    def of(self, one: Picture) -> str:
        image, seed = one.victim
        notes = [f"image {image}" * bool(image), f"seed {seed}" * (self._seeded and bool(seed))]
        notes += [f"{one.stage} model" * (self._staged and bool(one.stage))]
        return ", ".join(filter(None, notes))


def galleries(audit: Audit, order: Sequence[Column], album: Album) -> list[Gallery]:
    """One gallery per attack, those that decided a verdict first."""
    decisive = [judgment.worst.attack for judgment in audit.judgments if judgment.worst]
    notes = _Notes(audit.pictures)
    found: dict[str, dict[tuple[str, ...], list[Picture]]] = {name: {} for name in decisive}
    for one in audit.pictures:
        found.setdefault(one.attack, {}).setdefault((one.stage, *one.victim), []).append(one)
    return [
        _gallery(attack, list(victims.values()), order, album, notes)
        for attack, victims in found.items()
        if victims
    ]


def _gallery(
    attack: str,
    groups: Sequence[Sequence[Picture]],
    order: Sequence[Column],
    album: Album,
    notes: _Notes,
) -> Gallery:
    shown = {(one.defense, one.threat) for group in groups for one in group}
    kept = [column for column in order if (column.defense, column.threat) in shown]
    victims = []
    for group in groups:
        # The same place twice (other batches, other seeds of the attack) gives another row.
        left = list(group)
        while left:
            row: dict[_Place, Picture] = {}
            for one in left:
                row.setdefault((one.defense, one.threat), one)
            left = [one for one in left if row[one.defense, one.threat] is not one]
            victims.append(_victim(row, kept, album, notes))
    return Gallery(attack, kept, victims)


def _victim(
    row: Mapping[_Place, Picture], kept: Sequence[Column], album: Album, notes: _Notes
) -> Victim:
    first = next(iter(row.values()))
    tiles: list[Tile | None] = []
    for column in kept:
        one = row.get((column.defense, column.threat))
        tiles.append(_tile(column, one, album) if one else None)
    return Victim(
        label=first.label,
        note=notes.of(first),
        truth=_first(album, (one.truth for one in row.values())),
        floor=_first(album, (one.floor for one in row.values())),
        tiles=tiles,
    )


def _tile(column: Column, one: Picture, album: Album) -> Tile:
    return Tile(column, album.add(one.reconstruction), one.ssim, one.identified)


def _first(album: Album, names: Iterator[str]) -> Embedded | None:
    return next((found for name in names if (found := album.add(name))), None)


def heroes(audit: Audit, order: Sequence[Column], album: Album) -> list[Hero]:
    """Every verdict with its typical picture, leaks first."""
    rank = {"leaks": 0, "inconclusive": 1, "": 2, "holds": 3}
    ranked = sorted(audit.judgments, key=lambda judgment: rank[judgment.verdict])
    return [_hero(judgment, audit, order, album) for judgment in ranked]


def _hero(judgment: Judgment, audit: Audit, order: Sequence[Column], album: Album) -> Hero:
    threat = judgment.worst.threat if judgment.worst else ""
    known = audit.threats.get(threat, {})
    words = known.get("words")
    name = known.get("name")
    shown = name if isinstance(name, str) and threat not in THREATS and name else threat
    one = _typical(judgment.worst, audit.pictures) if judgment.worst else None
    victim = tile = None
    if one is not None:
        place = (one.defense, one.threat)
        column = next(x for x in order if (x.defense, x.threat) == place)
        victim = _victim({place: one}, [column], album, _Notes(()))
        tile = victim.tiles[0]
    return Hero(judgment, threat_name(shown), words if isinstance(words, str) else "", victim, tile)


def _typical(worst: Summary, pictures: Sequence[Picture]) -> Picture | None:
    """The picture of median SSIM in that cell; a lucky one would show more than is there."""
    cell = worst.cell[:4]
    mine = [x for x in pictures if (x.attack, x.defense, x.threat, x.stage) == cell]
    ranked = sorted(mine, key=lambda x: -1.0 if x.ssim is None else x.ssim)
    return ranked[len(ranked) // 2] if ranked else None


def films(audit: Audit, order: Sequence[Column], album: Album) -> tuple[list[Film], int]:
    """Films of attacks on victims, and how many more there would have been.

    Every attack's first victim comes first, then every attack's second, and so on until
    ``FILM_BYTES`` are reached: frames are most of what a page weighs.
    """
    groups: dict[str, dict[tuple[str, ...], list[Picture]]] = {}
    for one in audit.pictures:
        if one.sprite and one.frames > 1:
            victims = groups.setdefault(one.attack, {})
            victims.setdefault((one.stage, *one.victim), []).append(one)
    rounds = zip_longest(*(victims.values() for victims in groups.values()))
    queue = [group for among in rounds for group in among if group]
    notes = _Notes(audit.pictures)
    found: list[Film] = []
    for done, group in enumerate(queue):
        if sum(len(track.sprite.uri) for film in found for track in film.tracks) > FILM_BYTES:
            return found, len(queue) - done
        row = {(one.defense, one.threat): one for one in group}
        there = [column for column in order if (column.defense, column.threat) in row]
        made = (_track(column, row[column.defense, column.threat], album) for column in there)
        tracks = [track for track in made if track]
        if tracks:
            found.append(_film(group[0].attack, _victim(row, (), album, notes), tracks))
    return found, 0


def _track(column: Column, one: Picture, album: Album) -> Track | None:
    sprite = album.add(one.sprite)
    if sprite is None or one.frames > sprite.width:
        return None
    iterations = one.iterations
    if len(iterations) < one.frames or any(x is None for x in iterations):
        iterations = [float(i) for i in range(one.frames)]
    width = sprite.width / one.frames
    n = one.frames
    return Track(column, sprite, n, width, iterations[:n], one.losses[:n], one.ssims[:n])


def _film(attack: str, victim: Victim, tracks: Sequence[Track]) -> Film:
    steps = max((track.iterations for track in tracks), key=len)

    def curves(figures: Callable[[Track], Sequence[float | None]]) -> list[Curve]:
        return [
            Curve(t.column.name, t.column.color, t.column.dash, t.iterations, figures(t))
            for t in tracks
        ]

    return Film(
        attack=attack,
        victim=victim,
        tracks=tracks,
        steps=[0.0 if step is None else step for step in steps],
        loss=chart(curves(lambda track: track.losses), logarithmic=True),
        ssim=chart(curves(lambda track: track.ssims)),
    )
