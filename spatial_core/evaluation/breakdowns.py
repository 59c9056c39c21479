"""Recall@1 by what makes a query hard: how far the camera moved, how far off it stood, how few right answers exist."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from spatial_core.evaluation.pairs import positive_pairs
from spatial_core.evaluation.results import Bin, Breakdown
from spatial_core.evaluation.scores import Intervals, Queries, Values
from spatial_core.evaluation.spaces import RANDOM
from spatial_core.evaluation.split_data import SplitData

ANGLE, DISTANCE, VIEWS = "by_baseline_angle", "by_distance", "by_other_images"
_ANGLES_DEG = (0, 5, 10, 20, 30, 45, 60, 90, 180)
_DISTANCES_M = (0, 5, 10, 15, 20, 30, 50, 100)
_MOST_OTHERS = 6
_SAME_PLACE_M = 0.01


def angle_breakdown(split: SplitData, queries: Queries, intervals: Intervals) -> Breakdown:
    """By the horizontal angle, seen from the facade point, between the query's camera and the nearest other one.

    The nearest camera by angle is that of the easiest right answer: where it is far round, every right answer shows
    the building from another side.
    """
    if split.camera is None:
        return Breakdown(ANGLE, note="camera positions are not recorded in these splits")
    bins = [(low, f"{low}\N{EN DASH}{high}\N{DEGREE SIGN}") for low, high in pairwise(_ANGLES_DEG)]
    return _binned(ANGLE, nearest_angles(split, queries), bins, queries, intervals)


def distance_breakdown(split: SplitData, queries: Queries, intervals: Intervals) -> Breakdown:
    """By the distance of the query's camera from the facade point."""
    if split.distance_m is None:
        return Breakdown(DISTANCE, note="camera distances are not recorded in these splits")
    bins = [(low, f"{low}\N{EN DASH}{high} m") for low, high in pairwise(_DISTANCES_M)]
    bins.append((_DISTANCES_M[-1], f"over {_DISTANCES_M[-1]} m"))
    return _binned(DISTANCE, split.distance_m[queries.rows.numpy()], bins, queries, intervals)


def views_breakdown(split: SplitData, queries: Queries, intervals: Intervals) -> Breakdown:
    """By the number of other images of the query's building, beside the chance that grows with it."""
    bins = [(float(count), str(count)) for count in range(1, _MOST_OTHERS)]
    bins.append((float(_MOST_OTHERS), f"{_MOST_OTHERS} or more"))
    chance = queries.positives / (len(split) - 1)
    return _binned(VIEWS, queries.positives.astype(np.float64), bins, queries, intervals, chance=chance)


def nearest_angles(split: SplitData, queries: Queries) -> Values:
    """(Q,) degrees 0 to 180 to the nearest other camera of the same building; NaN where positions are unknown."""
    if split.camera is None:
        return np.full(len(queries.rows), np.nan)
    owner, image = positive_pairs(split.labels, queries.rows)
    # A camera at the facade point itself has no bearing.
    seen = np.where(
        np.hypot(*split.camera.T) > _SAME_PLACE_M, np.arctan2(split.camera[:, 0], split.camera[:, 1]), np.nan
    )
    turned = np.degrees(np.abs(seen[queries.rows.numpy()][owner] - seen[image]))
    angles = np.full(len(queries.rows), np.inf)
    np.fmin.at(angles, owner, np.minimum(turned, 360 - turned))
    angles[np.isinf(angles)] = np.nan
    return angles


def _binned(
    breakdown: str,
    values: Values,
    bins: Sequence[tuple[float, str]],
    queries: Queries,
    intervals: Intervals,
    *,
    chance: Values | None = None,
) -> Breakdown:
    """`bins` are (lower edge, label); a bin ends where the next begins, and the last one never does."""
    edges = np.array([edge for edge, _ in bins], dtype=np.float64)
    known = np.isfinite(values) & (values >= edges[0])
    place = np.searchsorted(edges, values, side="right") - 1
    outcomes = {method: found for method, found in queries.outcomes.items() if method != RANDOM}
    filled = []
    for number, (_, label) in enumerate(bins):
        inside = known & (place == number)
        if not inside.any():
            continue
        buildings = queries.buildings[inside]
        columns = [(found.first_rank.numpy()[inside] == 1).astype(np.float64) for found in outcomes.values()]
        estimates = intervals.of(columns, buildings)
        filled.append(
            Bin(
                label=label,
                queries=int(inside.sum()),
                buildings=len(np.unique(buildings)),
                scores=dict(zip(outcomes, estimates, strict=True)),
                chance=None if chance is None else float(chance[inside].mean()),
            )
        )
    return Breakdown(breakdown, tuple(filled), int((~known).sum()), "" if filled else "not recorded for any query")
