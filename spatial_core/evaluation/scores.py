"""Every method on the same queries of one split: recall, mAP and MRR with intervals, and the gain over the backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spatial_core.evaluation.results import CHANCE, MAP, METRICS, MRR, TOP_K
from spatial_core.evaluation.spaces import BACKBONE, PROJECTOR
from spatial_core.retrieval.bootstrap import Estimate, cluster_bootstrap
from spatial_core.retrieval.chance import chance
from spatial_core.retrieval.metrics import RetrievalMetrics, retrieval_metrics

Values = npt.NDArray[np.float64]
_CURVE_K = tuple(sorted({round(step * 10**power) for power in range(6) for step in (1, 1.5, 2, 3, 5, 7)}))


@dataclass(frozen=True)
class Intervals:
    """How means over queries get their intervals: number of resamples, level, and the seed of the draws."""

    samples: int
    confidence: float
    seed: int

    def of(self, columns: Sequence[Values], buildings: npt.NDArray[np.int64]) -> list[Estimate]:
        """Mean of each column of per-query values; `buildings` (Q,) are what is resampled."""
        return cluster_bootstrap(
            np.stack(columns, axis=1),
            buildings,
            samples=self.samples,
            confidence=self.confidence,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Queries:
    """The queries of a split and their outcome in every space.

    Args:
        rows: (Q,) int64 image rows.
        buildings: (Q,) building number of each.
        positives: (Q,) other images of the same building.
        outcomes: method -> ranks and precisions of the Q queries, on the CPU.
    """

    rows: Tensor
    buildings: npt.NDArray[np.int64]
    positives: npt.NDArray[np.int64]
    outcomes: Mapping[str, RetrievalMetrics]


@dataclass(frozen=True)
class Scores:
    """See `SplitResult` for the meaning of the parts."""

    scores: Mapping[str, Mapping[str, Estimate | None]]
    gains: Mapping[str, Estimate]
    curves: Mapping[str, tuple[float, ...]]
    curve_k: tuple[int, ...]


def run_queries(spaces: Mapping[str, Tensor], labels: Tensor, rows: Tensor, device: torch.device) -> Queries:
    """Search every query in every space."""
    outcomes = {}
    for name, vectors in spaces.items():
        found = retrieval_metrics(vectors.to(device), labels, rows, TOP_K)
        outcomes[name] = RetrievalMetrics(
            found.recall,
            found.mean_average_precision,
            found.mean_reciprocal_rank,
            found.first_rank.cpu(),
            found.average_precision.cpu(),
        )
    buildings = labels[rows].numpy()
    return Queries(rows, buildings, np.bincount(labels.numpy())[buildings] - 1, outcomes)


def score_methods(queries: Queries, images: int, intervals: Intervals) -> Scores:
    """Scores of all methods; the random order's expectation joins them as method `chance`, which has no interval."""
    others = images - 1
    # Where k reaches every other image, any ranking finds the building: the number would only look like a result.
    measured = [name for name in METRICS if not name.startswith("recall@") or _k(name) < others]
    columns = {method: [_per_query(outcome, name) for name in measured] for method, outcome in queries.outcomes.items()}
    gained = [ours - raw for ours, raw in zip(columns[PROJECTOR], columns[BACKBONE], strict=True)]
    every = [column for part in (*columns.values(), gained) for column in part]
    found = iter(intervals.of(every, queries.buildings))
    scores: dict[str, dict[str, Estimate | None]] = {}
    for method in columns:
        by_name = {name: next(found) for name in measured}
        scores[method] = {name: by_name.get(name) for name in METRICS}
    gains = {name: next(found) for name in measured}
    expected = chance(queries.positives, others, TOP_K)
    floor = {f"recall@{k}": share for k, share in expected.recall.items()}
    floor |= {MAP: expected.mean_average_precision, MRR: expected.mean_reciprocal_rank}
    scores[CHANCE] = {name: Estimate(floor[name]) if name in measured else None for name in METRICS}
    curve_k = tuple(k for k in _CURVE_K if k < others)
    curves = {
        method: tuple(round(float((outcome.first_rank <= k).double().mean()), 6) for k in curve_k)
        for method, outcome in queries.outcomes.items()
    }
    curves[CHANCE] = tuple(round(share, 6) for share in chance(queries.positives, others, curve_k).recall.values())
    return Scores(scores, gains, curves, curve_k)


def _k(name: str) -> int:
    return int(name.partition("@")[2])


def _per_query(outcome: RetrievalMetrics, name: str) -> Values:
    if name == MAP:
        values = outcome.average_precision
    elif name == MRR:
        values = 1.0 / outcome.first_rank.double()
    else:
        values = (outcome.first_rank <= _k(name)).double()
    column: Values = values.numpy()
    return column
