"""Training curves from the history that a checkpoint carries: one record an epoch, figures possibly nested."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spatial_core.evaluation.svg import Line

# Ordered quantities get ordered colours: k of recall@k, and bands from hardest to easiest.
_STEPS = ("q0", "q1", "q2", "q3", "q4")
_BANDS = ("h0", "h1", "h2", "h3", "h4", "h5", "h6", "random")


@dataclass(frozen=True)
class Curves:
    """One chart: `shares` says that the ordinate is a share, from 0 to 1."""

    title: str
    note: str
    lines: tuple[Line, ...]
    shares: bool


def training_curves(history: Sequence[Mapping[str, Any]]) -> list[Curves]:
    """Charts of losses, validation recall, triplets with gradient, and bands; those without figures are left out."""
    charts = [
        Curves("Loss", "", _lines(history, lambda name: "loss" in name, _STEPS[::2]), shares=False),
        Curves("Validation recall", "", _lines(history, lambda name: "recall@" in name, _STEPS), shares=True),
        Curves(
            "Triplets that still teach",
            "Share of triplets that violate the margin, and so give gradient.",
            _lines(history, lambda name: name == "active_fraction", _STEPS),
            shares=True,
        ),
        Curves(
            "Where the negatives came from",
            "Share of triplets by difficulty band of the negative, 0 hardest to 6 easiest.",
            _lines(history, lambda name: name.startswith("band_shares "), _BANDS),
            shares=True,
        ),
    ]
    return [chart for chart in charts if chart.lines]


def _lines(
    history: Sequence[Mapping[str, Any]], wanted: Callable[[str], bool], colours: Sequence[str]
) -> tuple[Line, ...]:
    points: dict[str, list[tuple[float, float]]] = {}
    for place, record in enumerate(history, start=1):
        epoch = float(record.get("epoch", place))
        for name, value in _numbers(record):
            if wanted(name):
                points.setdefault(name, []).append((epoch, value))
    names = sorted(points, key=_order)
    return tuple(Line(colours[place % len(colours)], _label(name), points[name]) for place, name in enumerate(names))


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def _order(name: str) -> tuple[str, int, str]:
    """Numbers at the end of names in numerical order: recall@5 before recall@10."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0), name


def _label(name: str) -> str:
    return name.removeprefix("band_shares ").replace("validation recall@", "recall@").replace("_", " ")
