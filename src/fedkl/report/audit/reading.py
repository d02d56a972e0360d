"""``audit.json`` → :class:`Audit`; everything that is not as it should be is found here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedkl.errors import CheckpointError
from fedkl.report.audit.facts import Audit, Cell, Interval, Judgment, Picture, Summary

FORMAT: Final = "fedkl-audit"
VERSION: Final = 1
_GREATEST: Final = 1e30
VERDICTS: Final = ("leaks", "holds", "inconclusive")
_SECTIONS: Final = {
    **dict.fromkeys(("config", "versions", "verdict", "threats", "accuracy"), Mapping),
    **dict.fromkeys(
        ("controls", "summary", "rows", "pictures", "skipped", "left_out", "caveats"), list
    ),
}


def read_audit(path: Path) -> Audit:
    """The facts of an ``audit.json``.

    Numbers that are null, missing or not finite become None; names that are needed to place a
    figure (attack, defense) must be there.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is missing, no JSON, of another format or version, or one of its
            entries has the wrong shape; the message names the first that has.
    """
    found = _load(path)
    try:
        return _audit(found)
    except _WrongShapeError as error:
        raise CheckpointError(
            f"{path}: {error}. It was edited or comes from another version of fedkl; run "
            "`fedkl audit` again into the same folder."
        ) from None


class _WrongShapeError(Exception):
    """What is wrong, without the file's name."""


def _load(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Expected the folder of a finished "
            "`fedkl audit`; check the path."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {error}. It was cut off or edited; run `fedkl audit` again."
        ) from error
    form = found.get("format") if isinstance(found, dict) else type(found).__name__
    if not isinstance(found, dict) or form != FORMAT:
        raise CheckpointError(
            f"{path} is not an audit: its format is {form!r}, expected {FORMAT!r}. Name a folder "
            "that `fedkl audit` wrote."
        )
    if found.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is an audit of version {found.get('version')!r}, expected {VERSION}. Use the "
            "fedkl that wrote it, or run `fedkl audit` again."
        )
    return found


def _audit(found: Mapping[str, Any]) -> Audit:
    part = {name: _section(found, name, kind) for name, kind in _SECTIONS.items()}
    summaries = tuple(_summary(f"summary[{i}]", x) for i, x in _entries(part, "summary"))
    threats = {str(k): _mapping(f"threats[{str(k)!r}]", v) for k, v in part["threats"].items() if v}
    return Audit(
        overall=_verdict("verdict.overall", part["verdict"].get("overall")),
        judgments=tuple(_judgments(part["verdict"], summaries)),
        summaries=summaries,
        advantages=_advantages(part),
        pictures=tuple(_picture(f"pictures[{i}]", x) for i, x in _entries(part, "pictures")),
        threats=threats,
        accuracy={
            str(name): {str(k): number(v) for k, v in figures.items()}
            for name, figures in part["accuracy"].items()
            if isinstance(figures, Mapping)
        },
        skipped=tuple(_absent(part)),
        caveats=tuple(filter(None, map(text, part["caveats"]))),
        candidates=max(2, _whole(part["config"].get("candidates")) or 100),
        controls=tuple(text(name) for name in part["controls"]),
        config=part["config"],
        versions=part["versions"],
        command=text(found.get("command")),
        data=text(found.get("data")),
        cost=text(found.get("cost")),
        certificate=found.get("certificate"),
    )


def number(value: Any) -> float | None:
    """``value`` if it is a number that can be drawn (finite, at most 1e30 in size), else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Comparisons work for NaN and for integers beyond all floats; conversions would not.
    return float(value) if abs(value) <= _GREATEST else None


def text(value: Any) -> str:
    """``value`` if it is text or an integer, else ""."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _section(found: Mapping[str, Any], name: str, kind: type) -> Any:
    value = found.get(name)
    if value is None:
        return [] if kind is list else {}
    if not isinstance(value, kind):
        wanted = "a list" if kind is list else "an object"
        raise _WrongShapeError(f"{name!r} is {type(value).__name__}, expected {wanted}")
    return value


def _entries(part: Mapping[str, Any], name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for i, entry in enumerate(part[name]):
        yield i, _mapping(f"{name}[{i}]", entry)


def _mapping(place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _WrongShapeError(f"{place} is {type(value).__name__}, expected an object")
    return value


def _names(place: str, entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    for name in ("attack", "defense"):
        if not text(entry.get(name)):
            raise _WrongShapeError(f"{place} names no {name}")
    attack, defense, threat, stage = (
        text(entry.get(k)) for k in ("attack", "defense", "threat", "stage")
    )
    return attack, defense, threat, stage


def _cell(place: str, entry: Mapping[str, Any]) -> Cell:
    batch, steps, observations, presentations = (
        _whole(entry.get(k)) for k in ("batch", "steps", "observations", "presentations")
    )
    return (*_names(place, entry), batch, steps, observations, presentations)


def _whole(value: Any) -> int | None:
    known = number(value)
    return None if known is None else int(known)


def _verdict(place: str, value: Any) -> str:
    if value is None:
        return ""
    if value not in VERDICTS:
        raise _WrongShapeError(f"{place} is {value!r}, expected one of {', '.join(VERDICTS)}")
    return str(value)


def _summary(place: str, entry: Mapping[str, Any]) -> Summary:
    figures = {
        str(name): Interval(*(number(value.get(k)) for k in ("mean", "low", "high")))
        for name, value in entry.items()
        if isinstance(value, Mapping) and name != "works"
    }
    works = entry.get("works")
    if isinstance(works, bool):  # one answer for both metrics
        works = dict.fromkeys(("advantage", "identified"), works)
    return Summary(
        cell=_cell(place, entry),
        control=entry.get("role") == "control",
        n=_whole(entry.get("n")),
        figures=figures,
        works={str(k): v for k, v in works.items() if isinstance(v, bool)}
        if isinstance(works, Mapping)
        else {},
        verdict=_verdict(f"{place}.verdict", entry.get("verdict")),
        reason=text(entry.get("reason")),
    )


def _judgments(verdict: Mapping[str, Any], summaries: Sequence[Summary]) -> Iterator[Judgment]:
    defenses = verdict.get("defenses")
    for name, entry in _mapping("verdict.defenses", {} if defenses is None else defenses).items():
        place = f"verdict.defenses[{str(name)!r}]"
        entry = _mapping(place, entry)
        worst = entry.get("worst")
        index = int(text(worst)) if text(worst).isdecimal() else -1
        yield Judgment(
            defense=str(name),
            verdict=_verdict(f"{place}.verdict", entry.get("verdict")),
            reason=text(entry.get("reason")),
            worst=summaries[index] if 0 <= index < len(summaries) else None,
        )


def _absent(part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Cells that were not done, and single victims of others, each with the reason."""
    for _, one in _entries(part, "skipped"):
        yield text(one.get("cell")), text(one.get("reason"))
    for _, one in _entries(part, "left_out"):
        yield f"{text(one.get('cell'))}, victim {text(one.get('victim'))}", text(one.get("reason"))


def _advantages(part: Mapping[str, Any]) -> dict[Cell, list[float]]:
    found: dict[Cell, list[float]] = {}
    for i, entry in _entries(part, "rows"):
        advantage = number(entry.get("advantage"))
        if advantage is not None:
            found.setdefault(_cell(f"rows[{i}]", entry), []).append(advantage)
    return found


def _picture(place: str, entry: Mapping[str, Any]) -> Picture:
    attack, defense, threat, stage = _names(place, entry)
    lists = {}
    for name in ("iterations", "losses", "ssims"):
        value = entry.get(name)
        lists[name] = tuple(number(x) for x in value) if isinstance(value, list) else ()
    identified = entry.get("identified")
    # A mean over seeds may come as a number.
    flag = number(identified) if not isinstance(identified, bool) else float(identified)
    return Picture(
        attack=attack,
        defense=defense,
        threat=threat,
        stage=stage,
        victim=(text(entry.get("image")), text(entry.get("seed"))),
        label=text(entry.get("label")),
        ssim=number(entry.get("ssim")),
        identified=None if flag is None else flag >= 0.5,
        truth=text(entry.get("truth")),
        floor=text(entry.get("floor")),
        reconstruction=text(entry.get("reconstruction")),
        sprite=text(entry.get("sprite")),
        frames=max(_whole(entry.get("frames")) or 0, 0),
        **lists,
    )
