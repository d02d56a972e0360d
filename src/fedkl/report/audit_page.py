"""The page of an audit: what leaks, shown rather than told."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedkl.report.audit import words
from fedkl.report.audit.facts import Audit, Interval, Summary
from fedkl.report.audit.gallery import films, galleries, heroes
from fedkl.report.audit.grid import KEY_HOLDER, Column, columns, matrix
from fedkl.report.audit.pictures import Album
from fedkl.report.audit.plots import Plane, scatter
from fedkl.report.audit.reading import read_audit
from fedkl.report.output import write_page

_TEMPLATES: Final = "templates/audit"
_FILTERS: Final[dict[str, Callable[..., Any]]] = {
    "figure": words.figure,
    "signed": words.signed,
    "percent": words.percent,
    "span": words.span,
    "setting": words.setting,
    "flat": words.flat,
    "defense": words.defense_name,
    "threat": words.threat_name,
}


def write_audit_page(folder: Path) -> Path:
    """Writes ``report.html`` beside the ``audit.json`` of ``folder``, from that file alone.

    One self-contained page that loads nothing: the PNG files that the audit names are embedded,
    each once; those that are missing, no PNG, or outside of ``folder`` are left out and said so.
    Without JavaScript everything is there but the slider (the frames stand side by side instead).

    Args:
        folder: Folder of a finished audit.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: ``audit.json`` is missing, damaged, or no audit of this version.
        OutputError: The page cannot be written.
    """
    folder = Path(folder)
    return write_page(folder / "report.html", _render(read_audit(folder / "audit.json"), folder))


def _render(audit: Audit, folder: Path) -> str:
    album = Album(folder)
    order = columns(audit)
    script = _asset("script.js")
    shown, left = films(audit, order, album)
    return (
        _environment()
        .get_template("page.html")
        .render(
            audit=audit,
            heroes=heroes(audit, order, album),
            galleries=galleries(audit, order, album),
            films=shown,
            films_left=left,
            matrix=matrix(audit, order),
            tradeoff=_tradeoff(audit, order),
            metrics=words.metrics(tuple(audit.summaries)),
            names=words.METRICS,
            flags=_flags(audit.threats),
            album=album,
            style=_asset("style.css"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fedkl", f"report/{_TEMPLATES}"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= _FILTERS
    environment.tests["recognizer"] = words.recognizes
    environment.globals["dash"] = words.DASH
    return environment


def _asset(name: str) -> str:
    return files("fedkl.report").joinpath(_TEMPLATES, name).read_text(encoding="utf-8")


def _flags(threats: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(property, its value under each threat model) for all that is neither name nor words."""
    flat = [
        words.flat({k: v for k, v in threat.items() if k not in ("name", "words")})
        for threat in threats.values()
    ]
    names = dict.fromkeys(name for threat in flat for name in threat)
    return [(name, [threat.get(name, words.DASH) for threat in flat]) for name in names]


def _tradeoff(audit: Audit, order: Sequence[Column]) -> Mapping[str, Any] | None:
    """Accuracy beside what each defense leaks; None if no accuracy is known."""
    known = {
        name: x for name, x in audit.accuracy.items() if any(v is not None for v in x.values())
    }
    if not known:
        return None
    kinds = [k for k in words.ACCURACIES if any(x.get(k) is not None for x in known.values())]
    others = {k for x in known.values() for k, v in x.items() if v is not None} - set(kinds)
    kinds += sorted(others)
    rows = [(name, _deciding(audit, name), figures) for name, figures in known.items()]
    return {
        "kinds": [(kind, words.ACCURACIES.get(kind, kind)) for kind in kinds],
        "rows": rows,
        "plane": _plane(order, rows),
    }


def _deciding(audit: Audit, defense: str) -> Summary | None:
    """The cell that decided the verdict on a defense, None if none did.

    Of a control, which gets no verdict, that of the greatest advantage, the key holder's aside.
    """
    for judgment in audit.judgments:
        if judgment.defense == defense:
            return judgment.worst
    mine = [
        one
        for one in audit.summaries
        if one.defense == defense and one.threat != KEY_HOLDER and one["advantage"].mean is not None
    ]
    return max(mine, key=lambda one: one["advantage"].mean or 0.0, default=None)


def _plane(
    order: Sequence[Column], rows: Sequence[tuple[str, Summary | None, Mapping[str, float | None]]]
) -> Plane | None:
    colors = {column.defense: column.color for column in reversed(order)}
    return scatter(
        [
            (words.defense_name(name), colors.get(name, 0), _advantage(worst), accuracy)
            for name, worst, figures in rows
            if (accuracy := figures.get("own_key")) is not None
        ]
    )


def _advantage(worst: Summary | None) -> Interval:
    return worst["advantage"] if worst else Interval()
