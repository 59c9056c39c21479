"""What cluster jobs used, for people: one picture that stands on its own, and the page around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spatial_core.cluster.usage import AssetUsage

_WIDTH = 840
_NAME, _TEXT = 180, 150  # widths of the columns left and right of the bars
_ROW, _HEAD = 24, 46
_STYLE = (
    "svg{background:#fff;font-family:system-ui,sans-serif}text{font-size:12px;fill:#171a1f}.head{font-weight:600}"
    ".faint{fill:#626a75}.track{fill:#f2f3ef}.gpu{fill:#e08a1e}.core{fill:#b9cdf3}.cpu{fill:#2a5bd7}.cost{fill:#2f9e83}"
    ".asked{fill:#e4e5e1}.peak{fill:#7a1f4f}"
)
HEADER = (
    "asset", "jobs", "not completed", "GPU hours", "core hours", "cores used", "peak memory", "memory asked", "cost",
)  # fmt: skip
_UNUSED = "-"


def render(usage: Sequence[AssetUsage], jobs: int) -> str:
    """The page; the same bytes for the same figures."""
    hours = sum(one.gpu_s for one in usage) / 3600, sum(one.core_s for one in usage) / 3600
    cost = sum(one.cost for one in usage)
    facts = [("jobs", f"{jobs:,}"), ("GPU hours", f"{hours[0]:,.1f}"), ("core hours", f"{hours[1]:,.1f}")]
    facts += [("cost", f"{cost:,.2f}")] if cost else []
    shown = "".join(f'<span class="fact">{escape(name)} <b>{escape(value)}</b></span>' for name, value in facts)
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADER)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(one)) + "</tr>" for one in usage)
    table = f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    body = (
        f'<header><div class="eyebrow">Cluster usage</div><h1>{_title(usage)}</h1><div class="facts">{shown}</div>'
        f"</header><section><h2>By asset</h2>{f'<div class=card>{picture(usage)}</div>' if usage else ''}</section>"
        f"<section>{table}</section>"
    )
    template = files("spatial_core.evaluation").joinpath("page.html").read_text(encoding="utf-8")
    titled = template.replace("<title>Retrieval report</title>", "<title>Cluster usage</title>")
    return titled.replace("<!--content-->", body)


def cells(one: AssetUsage) -> tuple[str, ...]:
    """A row of the table: what `HEADER` names."""
    bad = {state: count for state, count in one.states.items() if state != "COMPLETED"}
    return (
        one.asset,
        f"{one.jobs:,}",
        ", ".join(f"{count} {state}" for state, count in bad.items()) or _UNUSED,
        f"{one.gpu_s / 3600:,.2f}" if one.gpu_s else _UNUSED,
        f"{one.core_s / 3600:,.2f}",
        _UNUSED if one.cpu_share is None else f"{one.cpu_share:.0%}",
        _memory(one.memory_mb),
        _memory(one.memory_asked_mb),
        f"{one.cost:,.2f}" if one.cost else _UNUSED,
    )


def picture(usage: Sequence[AssetUsage]) -> str:
    """Bars by asset as an SVG that needs nothing around it: hours of GPUs and cores, memory asked and used, cost."""
    panels = [panel for panel in _PANELS if panel.always or any(panel.bars[0][1](one) for one in usage)]
    height = len(panels) * (_HEAD + _ROW * len(usage)) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img" '
        f'aria-label="use of the cluster by asset"><style>{_STYLE}</style>'
    ]
    top = 0
    for panel in panels:
        parts.append(f'<text class="head" x="10" y="{top + 32}">{escape(panel.title)}</text>')
        top += _HEAD
        largest = max((value(one) for one in usage for _, value in panel.bars), default=0.0) or 1.0
        for one in usage:
            parts.append(_row(one, panel, top, largest))
            top += _ROW
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Panel:
    """A group of bars: one row an asset, with bars inside each other (CSS class, length) and a text."""

    title: str
    bars: tuple[tuple[str, Callable[[AssetUsage], float]], ...]
    text: Callable[[AssetUsage], str]
    always: bool = False


_PANELS = (
    _Panel("GPU hours", (("gpu", lambda one: one.gpu_s),), lambda one: f"{one.gpu_s / 3600:,.2f}"),
    _Panel(
        "core hours, and how many of them were used",
        (("core", lambda one: one.core_s), ("cpu", lambda one: (one.cpu_share or 0) * one.core_s)),
        lambda one: f"{one.core_s / 3600:,.2f}" + ("" if one.cpu_share is None else f", {one.cpu_share:.0%} used"),
        always=True,
    ),
    _Panel(
        "memory asked for, and the highest peak",
        (("asked", lambda one: one.memory_asked_mb or 0), ("peak", lambda one: one.memory_mb or 0)),
        lambda one: f"{_memory(one.memory_mb)} of {_memory(one.memory_asked_mb)}",
        always=True,
    ),
    _Panel("cost", (("cost", lambda one: one.cost),), lambda one: f"{one.cost:,.2f}"),
)


def _row(one: AssetUsage, panel: _Panel, top: int, largest: float) -> str:
    room = _WIDTH - _NAME - _TEXT - 20
    name, text = escape(one.asset), escape(panel.text(one))
    parts = [
        f'<text x="{_NAME}" y="{top + 15}" text-anchor="end">{name}</text>'
        f'<rect class="track" x="{_NAME + 10}" y="{top + 4}" width="{room}" height="15" rx="3"/>'
    ]
    for number, (css, value) in enumerate(panel.bars):
        inset = 4 * number
        parts.append(
            f'<rect class="{css}" x="{_NAME + 10}" y="{top + 4 + inset}" width="{room * value(one) / largest:.1f}" '
            f'height="{15 - 2 * inset}" rx="2"><title>{name}: {text}</title></rect>'
        )
    parts.append(f'<text class="faint" x="{_WIDTH - _TEXT}" y="{top + 15}">{text}</text>')
    return "".join(parts)


def _title(usage: Sequence[AssetUsage]) -> str:
    if not usage:
        return "No job has ended yet"
    first = usage[0]
    what = f"costs {first.cost:,.2f}" if first.cost else f"takes {first.gpu_s / 3600:,.1f} GPU hours"
    if not (first.cost or first.gpu_s):
        what = f"takes {first.core_s / 3600:,.1f} core hours"
    return f"{escape(first.asset)} {what}, more than any other"


def _memory(megabytes: float | None) -> str:
    return _UNUSED if megabytes is None else f"{megabytes / 1024:.1f} GiB"
