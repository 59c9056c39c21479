"""Curves from the training history that a checkpoint carries: losses, and recall on val, by epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from spatial_core.evaluation.svg import Line

_COLOURS = ("projector", "backbone", "pca", "extra", "random")


def loss_lines(history: Sequence[Mapping[str, Any]]) -> list[Line]:
    """One line for each figure whose name speaks of a loss."""
    return _lines(history, lambda name: "loss" in name)


def recall_lines(history: Sequence[Mapping[str, Any]]) -> list[Line]:
    """One line for each recall@k."""
    return _lines(history, lambda name: "recall@" in name)


def _lines(history: Sequence[Mapping[str, Any]], wanted: Callable[[str], bool]) -> list[Line]:
    points: dict[str, list[tuple[float, float]]] = {}
    for place, record in enumerate(history, start=1):
        epoch = float(record.get("epoch", place))
        for name, value in _numbers(record):
            if wanted(name):
                points.setdefault(name, []).append((epoch, value))
    return [Line(_COLOURS[number % len(_COLOURS)], name, line) for number, (name, line) in enumerate(points.items())]


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)
