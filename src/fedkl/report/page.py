"""One self-contained HTML page around the results of several runs."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedkl.report.curves import arms_curves
from fedkl.report.output import write_page
from fedkl.report.verdict import verdict

FIGURES = {
    "own_key": "own key",
    "wrong_key": "wrong key",
    "wrong_key_p95": "wrong key p95",
    "other_client": "other client",
    "outsider": "outsider (no lock)",
    "no_lock": "insider (no lock)",
}


def write_report(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    command: str = "",
    versions: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    links: Sequence[tuple[str, str]] = (),
) -> Path:
    """Writes ``report.html`` into ``folder``: no scripts, no other files, nothing from a network.

    Args:
        folder: Where to; must exist.
        rows: A ``summary.json`` each, with ``name``, ``meaning`` (one line) and ``validation``
            (the lines of ``metrics.jsonl``) besides.
        title: Of the page.
        command: What to type to get the same again.
        versions: Name → version.
        notes: What a reader has to know first, such as a data set that was not there.
        links: (text, address relative to ``folder``) of further pages.

    Returns:
        The path of the page.

    Raises:
        OutputError: The page cannot be written.
    """
    lines = {row["name"]: row["validation"] for row in rows if row["validation"]}
    environment = Environment(
        loader=PackageLoader("fedkl", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    text = environment.get_template("template.html").render(
        title=title,
        verdict=verdict(rows),
        rows=rows,
        figures=FIGURES,
        light=_data_uri(arms_curves(lines)) if lines else "",
        dark=_data_uri(arms_curves(lines, dark=True)) if lines else "",
        settings=_settings(rows),
        command=command,
        versions=versions or {},
        notes=notes,
        links=links,
    )
    return write_page(folder / "report.html", text)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _settings(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(setting, value per row) for every setting, those that differ first."""
    flat = [_flat(row["config"]) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    table = [(name, [str(row.get(name, "–")) for row in flat]) for name in names]
    return sorted(table, key=lambda item: len(set(item[1])) == 1)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            flat[prefix + name] = value
    return flat
