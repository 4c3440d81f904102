"""Prepare line charts for the templates: coordinates, marks and texts, without a plotting library."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from philora.reporting.run_record import Point

BUCKETS = 300
"""Buckets of a curve, drawn by their lowest and highest values: enough for any screen, in a small file."""

SMOOTHED_FROM = 12
"""Number of points from which a curve is smoothed."""


class Curve(NamedTuple):
    """A line of a chart.

    Attributes:
        name: For the legend.
        style: CSS class of its stroke: `raw`, `smooth`, `eval` or `run-N`.
        points: The values as they were logged.
        dots: Whether points are marked, for curves of few points.
        span: Number of points that the line is smoothed over; 0 draws the values themselves.
    """

    name: str
    style: str
    points: Sequence[Point]
    dots: bool = False
    span: float = 0.0

    def drawn(self) -> list[Point]:
        """Return the points of the line, smoothed if it has a span."""
        return smoothed(self.points, self.span) if self.span else list(self.points)

    def sent(self) -> list[Point]:
        """Return the points that the page's script redraws the line from: few, and the means of a smoothed line."""
        return averaged(self.points, 2 * BUCKETS) if self.span else thinned(self.points)


class Axis(NamedTuple):
    """The range of steps that all charts of a page show, and the step of the kept checkpoint, with its label."""

    left: float
    right: float
    kept: tuple[int, str] | None = None


def smoothed(points: Sequence[Point], span: float) -> list[Point]:
    """Return the centred moving average over about `span` points.

    Towards the ends the window shrinks on both sides, so that a curve which falls steeply from its first step does not
    appear to start lower.
    """
    values = [y for _, y in points]
    for _ in range(2):  # twice half as wide: no corners where a single high value enters or leaves the window
        values = _centred_means(values, max(0, round(span / 4)))
    return [(x, y) for (x, _), y in zip(points, values, strict=True)]


def _centred_means(values: Sequence[float], radius: int) -> list[float]:
    """Return the mean around every value, with up to `radius` values on both sides and equally many on each."""
    sums = list(itertools.accumulate(values, initial=0.0))
    reach = [min(radius, index, len(values) - 1 - index) for index in range(len(values))]
    return [(sums[index + r + 1] - sums[index - r]) / (2 * r + 1) for index, r in enumerate(reach)]


def smoothing_span(points: Sequence[Point]) -> float:
    """Return the number of points that a curve is smoothed over; 0 if it has too few."""
    return max(5.0, len(points) / 16) if len(points) >= SMOOTHED_FROM else 0.0


def thinned(points: Sequence[Point], buckets: int = BUCKETS) -> list[Point]:
    """Return at most two points for every bucket, the lowest and the highest, so that spikes stay visible."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept = {points[0], points[-1]}
    for index in range(buckets):
        part = points[index * len(points) // buckets : (index + 1) * len(points) // buckets]
        kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(kept)


def averaged(points: Sequence[Point], buckets: int) -> list[Point]:
    """Return the mean of every bucket, for a line that is smoothed."""
    if len(points) <= buckets:
        return list(points)
    bounds = [index * len(points) // buckets for index in range(buckets + 1)]
    parts = [points[low:high] for low, high in itertools.pairwise(bounds)]
    return [(part[len(part) // 2][0], sum(y for _, y in part) / len(part)) for part in parts]


def ticks(low: float, high: float, marks: int = 4) -> list[float]:
    """Return round numbers, about `marks` steps apart, that enclose the range."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / marks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 15) for index in range(first, last + 1)]


def noisy_pair(name: str, points: Sequence[Point]) -> tuple[list[Curve], str]:
    """Return a noisy curve and a smoothed one, with a remark on the smoothing; a short curve alone, with its points."""
    span = smoothing_span(points)
    if not span:
        return [Curve(name, "smooth", points, dots=True)], ""
    curves = [Curve(name, "raw", points), Curve(f"{name}, smoothed", "smooth", points, span=span)]
    return curves, f"smoothed over about {span:.0f} entries"


def chart(
    title: str,
    curves: Sequence[Curve],
    axis: Axis,
    *,
    form: Callable[[float], str],
    short_form: Callable[[float], str] | None = None,
    from_zero: bool = False,
    note: str = "",
) -> dict[str, Any] | None:
    """Return a line chart for the template: paths in a square of 1000 units, labels in percent of it.

    Args:
        title: What the chart shows, with its unit.
        curves: The curves in drawing order; curves without points are left out.
        axis: The range of steps.
        form: Returns the text of a value.
        short_form: Returns a shorter one for the axis.
        from_zero: Whether the vertical axis starts at zero.
        note: A remark beside the title, or below a large chart.

    Returns:
        None if there is nothing to draw, because every curve has fewer than two points.
    """
    curves = [curve for curve in curves if curve.points]
    if max((len(curve.points) for curve in curves), default=0) < 2:
        return None
    ys = [y for curve in curves for _, y in curve.points]
    marks = ticks(0.0 if from_zero else min(ys), max(ys))
    frame = _Frame(axis.left, max(axis.right, axis.left + 1), marks[0], marks[-1])
    steps = [mark for mark in ticks(frame.left, frame.right, 5) if frame.left <= mark <= frame.right and mark % 1 == 0]
    kept = None if axis.kept is None else (frame.across(axis.kept[0]), f"{axis.kept[1]}: step {axis.kept[0]:,}")
    return {
        "title": title,
        "note": note,
        "curves": [frame.path(curve) for curve in curves],
        "data": json.dumps({**frame._asdict(), "zero": from_zero, "curves": [_data(curve) for curve in curves]}),
        "y_marks": [(f"{100 * frame.down(mark):.2f}", (short_form or form)(mark)) for mark in marks],
        "x_marks": [(f"{100 * frame.across(mark):.2f}", f"{mark:,.0f}") for mark in steps],
        "kept": None if kept is None else (f"{100 * kept[0]:.2f}", kept[1]),
        "summary": f"{title}: " + "; ".join(_summary(curve, form) for curve in curves),
    }


class _Frame(NamedTuple):
    """The ranges of a chart's axes."""

    left: float
    right: float
    bottom: float
    top: float

    def across(self, x: float) -> float:
        return (x - self.left) / (self.right - self.left)

    def down(self, y: float) -> float:
        return 1 - (y - self.bottom) / (self.top - self.bottom)

    def path(self, curve: Curve) -> dict[str, Any]:
        points = thinned(curve.drawn())
        dots = [(f"{100 * self.across(x):.2f}", f"{100 * self.down(y):.2f}") for x, y in points] if curve.dots else []
        path = "M" + "L".join(f"{1000 * self.across(x):.1f},{1000 * self.down(y):.1f}" for x, y in points)
        return {"name": curve.name, "style": curve.style, "path": path, "dots": dots}


def _data(curve: Curve) -> Mapping[str, Any]:
    """Return a curve for the page's script; its span is in points of the data that is sent."""
    points = curve.sent()
    return {
        "name": curve.name,
        "style": curve.style,
        "span": round(curve.span * len(points) / len(curve.points), 1),
        "dots": curve.dots,
        "points": [[x, float(f"{y:.5g}")] for x, y in points],
    }


def _summary(curve: Curve, form: Callable[[float], str]) -> str:
    return f"{curve.name} from {form(curve.points[0][1])} to {form(curve.points[-1][1])}"
