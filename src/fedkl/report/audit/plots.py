"""Where the ink goes: coordinates of the page's SVG drawings, which templates draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedkl.report.audit.facts import Interval

STRIP_WIDTH: Final = 130.0
STRIP_HEIGHT: Final = 30.0
_LEAKS_ABOVE: Final = 0.05
_MOST_DOTS: Final = 60

Scale = tuple[float, float]


@dataclass(frozen=True)
class Strip:
    """One cell's advantages: a dot an image, the mean and its interval, the floor's line."""

    zero: float
    limit: float
    dots: Sequence[tuple[float, float]]
    low: float | None
    high: float | None
    mean: float | None


@dataclass(frozen=True)
class Curve:
    """What to draw as one curve; ``xs`` and ``ys`` may have gaps and differ in length."""

    name: str
    color: int
    dash: int
    xs: Sequence[float | None]
    ys: Sequence[float | None]

    def points(self) -> list[tuple[float, float]]:
        """The points of which both coordinates are known."""
        pairs = zip(self.xs, self.ys, strict=False)
        return [(x, y) for x, y in pairs if x is not None and y is not None and x >= 0]


@dataclass(frozen=True)
class Trace:
    """One curve; ``points`` is an SVG path in the chart's coordinates."""

    path: str
    color: int
    dash: int
    name: str


@dataclass(frozen=True)
class Frame:
    """A drawing of width × height whose data lies in [left, right] × [top, bottom], y downwards."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float

    def across(self, share: float) -> float:
        """The x of a share in [0, 1] of the way from left to right."""
        return round(self.left + share * (self.right - self.left), 1)

    def up(self, share: float) -> float:
        """The y of a share in [0, 1] of the way from bottom to top."""
        return round(self.bottom - share * (self.bottom - self.top), 1)


@dataclass(frozen=True)
class Chart:
    """Curves over [0, ``x_high``] with ticks, (coordinate, text) each."""

    frame: Frame
    traces: Sequence[Trace]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    log: bool
    x_high: float


@dataclass(frozen=True)
class Point:
    """A defense in the plane of leakage (x) and accuracy (y)."""

    name: str
    x: float
    y: float
    low: float | None
    high: float | None
    color: int
    label_y: float
    left: bool


@dataclass(frozen=True)
class Plane:
    """Points in a frame; ``zero`` is the x of the floor."""

    frame: Frame
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    zero: float
    points: Sequence[Point]


_CHART: Final = Frame(460.0, 210.0, 46.0, 450.0, 10.0, 178.0)
_PLANE: Final = Frame(560.0, 300.0, 52.0, 545.0, 12.0, 262.0)


def strip_scale(values: Sequence[float | None]) -> Scale:
    """The common scale of all strips: around the floor, and as far as the figures go."""
    known = [value for value in values if value is not None]
    return max(-1.0, min([-0.1, *known])), min(1.0, max([0.3, *known]))


def strip(interval: Interval, values: Sequence[float], scale: Scale) -> Strip | None:
    """The strip of one cell, None if there is nothing to draw.

    Of more than sixty images sixty quantiles are drawn, which look the same.
    """
    if interval.mean is None and not values:
        return None

    def place(value: float | None) -> float | None:
        if value is None:
            return None
        share = (min(max(value, scale[0]), scale[1]) - scale[0]) / (scale[1] - scale[0])
        return round(4 + share * (STRIP_WIDTH - 8), 1)

    ranked = sorted(values)
    if len(ranked) > _MOST_DOTS:
        ranked = [
            ranked[round(i * (len(ranked) - 1) / (_MOST_DOTS - 1))] for i in range(_MOST_DOTS)
        ]
    # Neighbors in rank on different heights, so that they do not hide each other.
    dots = [(place(value) or 0.0, 5.0 + 5.0 * (i % 3)) for i, value in enumerate(ranked)]
    return Strip(
        zero=place(0.0) or 0.0,
        limit=place(_LEAKS_ABOVE) or 0.0,
        dots=dots,
        low=place(interval.low),
        high=place(interval.high),
        mean=place(interval.mean),
    )


def chart(curves: Sequence[Curve], *, logarithmic: bool = False) -> Chart | None:
    """Curves over iterations; points without an x or a y are left out.

    Args:
        curves: What to draw.
        logarithmic: Use powers of ten if all values are positive and span more than tenfold.

    Returns:
        None if no curve has a point.
    """
    clean = [(curve, points) for curve in curves if (points := curve.points())]
    if not clean:
        return None
    x_high = max(x for _, points in clean for x, _ in points)
    x_high = x_high if x_high > 0 else 1.0
    values = [y for _, points in clean for _, y in points]
    log = logarithmic and min(values) > 0 and max(values) > 10 * min(values)
    low, high = _range([math.log10(y) for y in values] if log else [*values, 0.0])

    def spot(x: float, y: float) -> tuple[float, float]:
        rise = ((math.log10(y) if log else y) - low) / (high - low)
        return _CHART.across(x / x_high), _CHART.up(rise)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join("{} {}".format(*spot(x, y)) for x, y in points)

    return Chart(
        frame=_CHART,
        traces=[Trace(path(points), one.color, one.dash, one.name) for one, points in clean],
        x_ticks=[(_CHART.across(x / x_high), _short(x)) for x in ticks(0, x_high)],
        y_ticks=[(spot(0, y)[1], _short(y)) for y in (_decades if log else ticks)(low, high)],
        log=log,
        x_high=x_high,
    )


def scatter(points: Sequence[tuple[str, int, Interval, float]]) -> Plane | None:
    """Leakage against accuracy.

    Args:
        points: (name, color, advantage, accuracy) each; those without a mean are left out.

    Returns:
        Axes and points, None if there is no point.
    """
    known = [(name, color, x, x.mean, y) for name, color, x, y in points if x.mean is not None]
    if not known:
        return None
    reach = [x for _, _, i, mean, _ in known for x in (i.low, i.high, mean) if x is not None]
    x_low, x_high = min([-0.05, *reach]), max([0.2, *reach]) + 0.02
    y_low = max(min(y for *_, y in known) - 0.06, -0.02)
    y_high = min(max(y for *_, y in known) + 0.04, 1.02)

    def across(value: float) -> float:
        return _PLANE.across((value - x_low) / (x_high - x_low))

    def down(value: float) -> float:
        return _PLANE.up((value - y_low) / (y_high - y_low))

    placed: list[Point] = []
    for name, color, interval, mean, accuracy in sorted(known, key=lambda item: -item[4]):
        x, y = across(mean), down(accuracy)
        low, high = (None if v is None else across(v) for v in (interval.low, interval.high))
        height = _free_height(y - 9, [o.label_y for o in placed if abs(o.x - x) < 150])
        placed.append(Point(name, x, y, low, high, color, height, x > _PLANE.across(0.72)))
    return Plane(
        frame=_PLANE,
        x_ticks=[(across(x), _short(x)) for x in ticks(x_low, x_high)],
        y_ticks=[(down(y), f"{_short(100 * y)} %") for y in ticks(y_low, y_high)],
        zero=across(0.0),
        points=placed,
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most ``most`` + 1 round numbers (1, 2 or 5 times a power of ten apart) in [low, high]."""
    width = high - low
    if not (width > 0 and math.isfinite(width)):
        return [low]
    unit = 10.0 ** math.floor(math.log10(width / most))
    step = next(unit * k for k in (1, 2, 5, 10) if width / (unit * k) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)


def _decades(low: float, high: float) -> list[float]:
    exponents = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    step = max(1, math.ceil(len(exponents) / 5))
    return [10.0**e for e in exponents[::step]] or [10.0**low, 10.0**high]


def _free_height(wanted: float, taken: Sequence[float]) -> float:
    height = wanted
    for other in sorted(taken):
        if abs(height - other) < 15:
            height = other + 15
    return height


def _short(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")
