"""Confidence intervals of means over queries, by resampling buildings.

Queries of one building succeed and fail together, so resampling queries one by one would promise too much. Whole
buildings are drawn with replacement instead. All columns share one set of draws: the interval of a difference of two
methods is that of a column holding the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_BLOCK_WEIGHTS = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; `low` and `high` are None when a single building gives nothing to resample."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> list[float] | None:
        """[low, high] rounded for JSON, or None."""
        return None if self.low is None or self.high is None else [round(self.low, 6), round(self.high, 6)]

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval or (None, None)
        return {"value": round(self.value, 6), "low": low, "high": high}


def cluster_bootstrap(
    values: npt.NDArray[np.float64],
    clusters: npt.NDArray[np.int64],
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> list[Estimate]:
    """Mean of each column of `values`, with a percentile interval from resampled clusters.

    Args:
        values: (Q, M), one row a query; finite.
        clusters: (Q,) building of each query.
        samples: number of resamples.
        confidence: level of the interval, for example 0.95.
        seed: of the draws.

    Returns:
        M estimates. Memory is bounded by blocks of 4 M weights, whatever `samples` and the number of buildings.
    """
    means = values.mean(axis=0)
    _, member = np.unique(clusters, return_inverse=True)
    count = int(member.max()) + 1
    if count < 2:
        return [Estimate(float(mean)) for mean in means]
    sizes = np.bincount(member, minlength=count).astype(np.float64)
    sums = np.stack([np.bincount(member, weights=column, minlength=count) for column in values.T], axis=1)
    generator = np.random.default_rng(seed)
    drawn = np.empty((samples, values.shape[1]))
    step = max(1, _BLOCK_WEIGHTS // count)
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        picks = generator.integers(0, count, (rows, count)) + np.arange(rows)[:, None] * count
        weights = np.bincount(picks.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)
        drawn[start : start + rows] = (weights @ sums) / (weights @ sizes)[:, None]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return [Estimate(*map(float, triple)) for triple in zip(means, low, high, strict=True)]
