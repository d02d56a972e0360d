"""Accuracy over the rounds as PNG, for a light or a dark page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = Sequence[Mapping[str, Any]]
"""Lines of ``metrics.jsonl``: ``{"round": 5, "accuracy": {"own_key": 0.8, …}, …}``."""

# Okabe and Ito's colors, distinct for color-blind eyes; each series has its own marker as well.
_COLORS: Final = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#8C8C8C")
_MARKERS: Final = ("s", "o", "^", "D", "v", "P", "X")
_OWN, _WRONG, _NONE = "#009E73", "#D55E00", "#56B4E9"
_DPI: Final = 160


def run_curves(lines: Lines, *, title: str = "", dark: bool = False) -> bytes:
    """Validation accuracy of one run: own key, wrong key with its spread, no lock.

    Args:
        lines: At least one evaluation.
        title: Above the axes.
        dark: For a dark page.

    Returns:
        A PNG file.
    """
    figure = _figure(7.2, 4.2, dark)
    axes = figure.subplots()
    _plot(axes, lines, "own_key", label="own key", color=_OWN, marker="o")
    locked = any(line["accuracy"].get("wrong_key") is not None for line in lines)
    if locked:
        _plot(axes, lines, "wrong_key", label="wrong key, mean", color=_WRONG, marker="s")
        x, mean = _series(lines, "wrong_key")
        _, high = _series(lines, "wrong_key_p95")
        axes.fill_between(x, mean, high, color=_WRONG, alpha=0.18, lw=0, label="wrong key, to p95")
    apart = [_series(lines, name) for name in ("own_key", "outsider")]
    if apart[0] != apart[1]:  # without a lock they are the same thing
        _plot(axes, lines, "outsider", label="outsider (no lock)", color=_NONE, marker="^")
    _dress(axes, "round", title)
    axes.set_ylabel("validation accuracy")
    _legend(figure, axes, columns=4)
    return _png(figure, dark)


def arms_curves(arms: Mapping[str, Lines], *, dark: bool = False) -> bytes:
    """Several runs side by side: on the left with the own key, on the right without any.

    Args:
        arms: Lines by name of the run.
        dark: For a dark page.

    Returns:
        A PNG file.
    """
    figure = _figure(10.5, 4.4, dark)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, lines) in enumerate(arms.items()):
        style = {"color": _COLORS[number % 7], "marker": _MARKERS[number % 7], "label": name}
        _plot(left, lines, "own_key", **style)
        _plot(right, lines, "outsider", **style)
    _dress(left, "round", "with the client's own key")
    _dress(right, "round", "what the best outsider gets")
    left.set_ylabel("validation accuracy")
    _legend(figure, left, columns=min(5, len(arms)))
    return _png(figure, dark)


def _series(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    kept = [line for line in lines if line["accuracy"].get(name) is not None]
    return [line["round"] for line in kept], [line["accuracy"][name] for line in kept]


def _plot(axes: Axes, lines: Lines, name: str, **style: Any) -> None:
    x, y = _series(lines, name)
    axes.plot(x, y, lw=1.8, ms=4.5, alpha=0.9, clip_on=False, **style)


def _legend(figure: Figure, axes: Axes, *, columns: int) -> None:
    # Below the axes: wherever it stood inside, some curve would run through it.
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _figure(width: float, height: float, dark: bool) -> Figure:
    # Not pyplot: no global state, no window, whatever backend is configured.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.set_facecolor("#16181d" if dark else "#ffffff")
    return figure


def _dress(axes: Axes, xlabel: str, title: str) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(xlabel)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure, dark: bool) -> bytes:
    from matplotlib.text import Text

    ink, ground = ("#e6e6e6", "#16181d") if dark else ("#222222", "#ffffff")
    for axes in figure.axes:
        axes.set_facecolor(ground)
        axes.tick_params(colors=ink)
        for spine in axes.spines.values():
            spine.set_color(ink)
    texts = [text for axes in figure.axes for text in (axes.xaxis.label, axes.yaxis.label)]
    texts += [text for axes in figure.axes for text in axes.findobj(Text)]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    for text in texts:
        text.set_color(ink)
        # Verbatim: a name may hold dollar signs, which matplotlib would read as mathematics.
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=ground, metadata={"Software": None})
    return buffer.getvalue()
