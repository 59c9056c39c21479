"""The charts of the report as inline SVG: no script, no library, the same bytes for the same numbers.

Colours come from the page's style sheet by class, so charts follow its light and dark theme. Every mark has a <title>,
which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from spatial_core.retrieval.bootstrap import Estimate

Scale = Callable[[float], float]
_SMALL_SHARE = 0.4


@dataclass(frozen=True)
class Bars:
    """One method of a bar chart: CSS class, name, and one estimate (or None) a group."""

    css: str
    label: str
    estimates: Sequence[Estimate | None]


@dataclass(frozen=True)
class Line:
    """One line of a line chart: CSS class, name, and (x, y) points in order of x."""

    css: str
    label: str
    points: Sequence[tuple[float, float]]


def percent(value: float, digits: int = 1) -> str:
    """0.831 -> `83.1 %`."""
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def interval_text(found: Estimate) -> str:
    """`83.1 % (79.0 to 86.9)`, without the bracket where there is no interval."""
    if found.low is None or found.high is None:
        return percent(found.value)
    return f"{percent(found.value)} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def bar_chart(groups: Sequence[str], bars: Sequence[Bars], chance: Sequence[float | None], description: str) -> str:
    """Bars of shares with interval whiskers, grouped; a dashed tick marks chance. `groups` may hold a second line."""
    width, height, left, top, bottom = 560.0, 270.0, 40.0, 14.0, 44.0
    floor = height - bottom
    room = (width - left - 8) / max(1, len(groups))
    bar = min(26.0, 0.78 * room / max(1, len(bars)))

    def y(share: float) -> float:
        return floor - share * (floor - top)

    parts = [_frame(width, height, description), _ordinate(y, 1.0, left, width - 8, shares=True)]
    for place, group in enumerate(groups):
        middle = left + room * (place + 0.5)
        start = middle - bar * len(bars) / 2
        for number, series in enumerate(bars):
            found = series.estimates[place]
            if found is not None:
                x = start + number * bar
                title = escape(f"{series.label}, {group.replace(chr(10), ', ')}: {interval_text(found)}")
                parts.append(f'<g class="{series.css}"><title>{title}</title>')
                parts.append(_rounded_bar(x + 1.5, y(found.value), bar - 3, floor) + _whisker(found, x + bar / 2, y))
                parts.append("</g>")
        floor_share = chance[place]
        if floor_share is not None:
            parts.append(
                f'<line class="chance" x1="{start:.1f}" x2="{start + bar * len(bars):.1f}" y1="{y(floor_share):.1f}" '
                f'y2="{y(floor_share):.1f}"><title>chance {percent(floor_share)}</title></line>'
            )
        for line, text in enumerate(group.split("\n")):
            css = "tick" if line == 0 else "tick faint"
            parts.append(
                f'<text class="{css}" x="{middle:.1f}" y="{floor + 17 + 14 * line:.1f}" text-anchor="middle">'
                f"{escape(text)}</text>"
            )
    return "".join([*parts, "</svg>"])


def line_chart(
    lines: Sequence[Line], description: str, *, log_x: bool = False, shares: bool = True, x_label: str = ""
) -> str:
    """Lines over a linear or logarithmic abscissa; `shares` are in percent, up to 100 unless all of them are small."""
    width, height, left, right, top, bottom = 560.0, 270.0, 46.0, 14.0, 14.0, 44.0
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    top_y = max(y for _, y in points)
    high_y = 1.0 if shares and top_y > _SMALL_SHARE else _round_up(top_y)

    def place_x(value: float) -> float:
        if log_x:
            value, first, last = math.log10(value), math.log10(low_x), math.log10(high_x)
        else:
            first, last = low_x, high_x
        return left + (value - first) / ((last - first) or 1.0) * (width - left - right)

    def place_y(value: float) -> float:
        return height - bottom - value / high_y * (height - top - bottom)

    parts = [_frame(width, height, description)]
    parts.append(_ordinate(place_y, high_y, left, width - right, shares=shares))
    for value in _log_ticks(low_x, high_x) if log_x else _even_ticks(low_x, high_x):
        parts.append(
            f'<text class="tick" x="{place_x(value):.1f}" y="{height - bottom + 18:.1f}" text-anchor="middle">'
            f"{value:g}</text>"
        )
    if x_label:
        parts.append(
            f'<text class="tick faint" x="{(left + width - right) / 2:.1f}" y="{height - 8:.1f}" '
            f'text-anchor="middle">{escape(x_label)}</text>'
        )
    for line in lines:
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in line.points)
        parts.append(f'<g class="{line.css}"><polyline class="curve" points="{path}"/>')
        for x, y in line.points:
            shown = percent(y) if shares else f"{y:.4g}"
            title = escape(f"{line.label}, {x:g}: {shown}")
            dot = f'<circle class="dot" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="2.6">'
            parts.append(f"{dot}<title>{title}</title></circle>")
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def interval_strip(bars: Sequence[tuple[str, str, Estimate]], description: str) -> str:
    """One row a method: a bar from 0, its interval as a whisker. For (css, label, estimate) of shares."""
    width, row = 300.0, 19.0
    height = row * len(bars) + 2

    def x(share: float) -> float:
        return share * width

    parts = [_frame(width, height, description)]
    for number, (css, label, found) in enumerate(bars):
        middle = row * number + row / 2 + 1
        parts.append(f'<g class="{css}"><title>{escape(f"{label}: {interval_text(found)}")}</title>')
        parts.append(f'<rect class="track" x="0" y="{middle - 5:.1f}" width="{width:g}" height="10" rx="5"/>')
        parts.append(
            f'<rect class="bar" x="0" y="{middle - 5:.1f}" width="{max(x(found.value), 3):.1f}" height="10" rx="5"/>'
        )
        if found.low is not None and found.high is not None:
            parts.append(
                f'<path class="whisker" d="M{x(found.low):.1f} {middle:.1f}H{x(found.high):.1f}'
                f'M{x(found.low):.1f} {middle - 4:.1f}v8M{x(found.high):.1f} {middle - 4:.1f}v8"/>'
            )
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def scatter(points: Sequence[tuple[float, float, str, str, str]], description: str) -> str:
    """A square map of (x, y, css, key, title), x and y within 0 to 1; marks of one key light up together."""
    side, edge = 520.0, 14.0
    parts = [_frame(side, side, description)]
    for x, y, css, key, title in points:
        parts.append(
            f'<circle class="{css}" data-b="{escape(key)}" cx="{edge + x * (side - 2 * edge):.1f}" '
            f'cy="{edge + (1 - y) * (side - 2 * edge):.1f}" r="4"><title>{escape(title)}</title></circle>'
        )
    return "".join([*parts, "</svg>"])


def _frame(width: float, height: float, description: str) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(description)}">'


def _rounded_bar(x: float, top: float, width: float, floor: float) -> str:
    radius = min(3.0, width / 2, max(0.0, floor - top))
    return (
        f'<path class="bar" d="M{x:.1f} {floor:.1f}V{top + radius:.1f}q0 {-radius:.1f} {radius:.1f} {-radius:.1f}'
        f'h{width - 2 * radius:.1f}q{radius:.1f} 0 {radius:.1f} {radius:.1f}V{floor:.1f}z"/>'
    )


def _whisker(found: Estimate, x: float, y: Scale) -> str:
    if found.low is None or found.high is None:
        return ""
    low, high = y(found.low), y(found.high)
    return f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"/>'


def _ordinate(y: Scale, high: float, left: float, right: float, *, shares: bool) -> str:
    """Horizontal rules at quarters of the range, labelled on the left."""
    parts = []
    for quarter in range(5):
        value = high * quarter / 4
        text = f"{100 * value:.0f}%" if shares else f"{value:.3g}"
        css = "axis" if quarter == 0 else "rule"
        parts.append(f'<line class="{css}" x1="{left:.1f}" x2="{right:.1f}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 7:.1f}" y="{y(value) + 4:.1f}" text-anchor="end">{text}</text>')
    return "".join(parts)


def _round_up(value: float) -> float:
    """The next value whose quarters are short numbers."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if step * power >= value * (1 - 1e-9))


def _even_ticks(low: float, high: float) -> list[float]:
    """At most seven whole numbers, evenly spaced."""
    step = max(1, math.ceil((high - low) / 6))
    return [low + step * number for number in range(int((high - low) // step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**power for power in range(first, last + 1)]
