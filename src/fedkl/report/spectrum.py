"""The singular values of a certificate as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fedkl.report.curves import _COLORS, _figure, _legend, _png

_FLOOR: Final = 1e-10


def spectrum_plot(certified: Mapping[str, Any], *, title: str = "", dark: bool = False) -> bytes:
    """Left, singular values that are left when the secrets are unknown; right, what they add up to.

    Args:
        certified: Contents of ``certificate.json``, or the like: ``defense`` and ``certificates``,
            at least one, each with ``spectrum``, ``tolerance``, ``directions``, ``known``, ``of``
            and ``presentations``.
        title: Above the left axes.
        dark: For a dark page.

    Returns:
        A PNG file.
    """
    found = certified["certificates"]
    figure = _figure(10.5, 4.4, dark)
    left, right = figure.subplots(1, 2)
    for number, one in enumerate(found):
        values = [max(value, _FLOOR) for value in one["spectrum"]]
        place = [(i + 1) / len(values) for i in range(len(values))]
        label, color = str(one["presentations"]), _COLORS[number % len(_COLORS)]
        left.plot(place, values, lw=1.6, color=color, label=label)
    left.axhline(found[0]["tolerance"], color="#8C8C8C", ls="--", lw=1, label="tolerance")
    left.set_yscale("log")
    # Text is drawn verbatim here: matplotlib's own labels of powers would show their TeX.
    left.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    left.set_xlabel("directions, as a share of the pixels")
    left.set_ylabel("singular value, relative")
    left.set_title(title, loc="left", fontsize=11)
    count = [one["presentations"] for one in found]
    for name, label, color, marker in (
        ("directions", "secrets unknown", "#D55E00", "o"),
        ("known", "secrets known", "#56B4E9", "s"),
    ):
        share = [one[name] / one["of"] for one in found]
        right.plot(count, share, marker=marker, ms=4.5, lw=1.8, color=color, label=label)
    right.set_xscale("log", base=2)
    right.set_xticks(count, [str(value) for value in count])
    right.set_ylim(-0.02, 1.02)
    right.set_xlabel("presentations")
    right.set_ylabel("share of directions identified")
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, left, columns=7)
    right.legend(frameon=False, loc="center left")
    return _png(figure, dark)
