"""What an evaluation found, as plain records: filled by the measuring modules, read by the page and the JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spatial_core.retrieval.bootstrap import Estimate

TOP_K = (1, 5, 10, 100, 1000)
MAP, MRR = "mAP", "MRR"
METRICS = (*(f"recall@{k}" for k in TOP_K), MAP, MRR)
CHANCE = "chance"


@dataclass(frozen=True)
class Bin:
    """One bar of a breakdown.

    Args:
        label: what the bin holds, for people.
        queries: queries in it.
        buildings: buildings those queries show.
        scores: method -> estimate.
        chance: what a random order would score; None where it is not defined.
        extra: further figures, JSON-serialisable.
    """

    label: str
    queries: int
    buildings: int
    scores: Mapping[str, Estimate]
    chance: float | None = None
    extra: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "queries": self.queries,
            "buildings": self.buildings,
            "scores": {method: estimate.to_json() for method, estimate in self.scores.items()},
            "chance": None if self.chance is None else round(self.chance, 6),
            **self.extra,
        }


@dataclass(frozen=True)
class Breakdown:
    """Results by a property of the query.

    Args:
        name: key in the JSON.
        bins: bars in their natural order; bins without queries are left out.
        unknown: queries whose property is not recorded.
        note: why there are no bins; empty when there are.
    """

    name: str
    bins: tuple[Bin, ...] = ()
    unknown: int = 0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"bins": [entry.to_json() for entry in self.bins], "unknown_queries": self.unknown, "note": self.note}


@dataclass(frozen=True)
class SplitResult:
    """One split.

    Args:
        split: val or test.
        images: images searched.
        buildings: buildings they show.
        queries: query images.
        query_buildings: buildings the queries show.
        scores: method -> metric -> estimate; None where the gallery is too small for the metric to say anything.
        gains: metric -> projector minus raw backbone, with an interval of the paired difference.
        curves: method -> recall at every k of `curve_k`.
        curve_k: abscissa of `curves`.
        breakdowns: by difficulty band, angle, distance and number of right answers.
        near_training: share of the split's buildings within 25 m of a training building; None when not recorded.
        note: why nothing was measured; empty when something was.
    """

    split: str
    images: int
    buildings: int
    queries: int = 0
    query_buildings: int = 0
    scores: Mapping[str, Mapping[str, Estimate | None]] = field(default_factory=dict)
    gains: Mapping[str, Estimate] = field(default_factory=dict)
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    curve_k: tuple[int, ...] = ()
    breakdowns: tuple[Breakdown, ...] = ()
    near_training: float | None = None
    note: str = ""

    def breakdown(self, name: str) -> Breakdown:
        """The breakdown of that name, an empty one when it was not made."""
        return next((entry for entry in self.breakdowns if entry.name == name), Breakdown(name, note=self.note))

    def headline(self) -> list[dict[str, Any]]:
        """One flat record a method: metric and metric_ci ([low, high] or None), sizes, split and method."""
        return [
            {
                "split": self.split,
                "method": method,
                "queries": self.queries,
                "buildings": self.query_buildings,
                "images": self.images,
                **{name: None if found is None else round(found.value, 6) for name, found in scores.items()},
                **{f"{name}_ci": None if found is None else found.interval for name, found in scores.items()},
            }
            for method, scores in self.scores.items()
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "buildings": self.buildings,
            "queries": self.queries,
            "query_buildings": self.query_buildings,
            "share_of_buildings_within_25m_of_training": self.near_training,
            "note": self.note,
            "methods": {
                method: {name: None if found is None else found.to_json() for name, found in scores.items()}
                for method, scores in self.scores.items()
            },
            "gain_over_backbone": {name: gain.to_json() for name, gain in self.gains.items()},
            "recall_curve": {"k": list(self.curve_k), **{name: list(curve) for name, curve in self.curves.items()}},
            **{entry.name: entry.to_json() for entry in self.breakdowns},
        }
