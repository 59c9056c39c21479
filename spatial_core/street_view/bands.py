"""From visual distances to difficulty bands: a distance relative to how crowded the anchor's surroundings are.

Neighbour lists of different lengths lie one after another in flat arrays; anchor i owns entries
`offsets[i]` to `offsets[i + 1]`, nearest first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PERCENTILES = (5.0, 10.0, 20.0, 40.0, 60.0, 85.0)
BANDS = len(PERCENTILES) + 1
MIN_CALIBRATION_ANCHORS = 10_000

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


def local_scales(distances: npt.NDArray[np.floating], offsets: Int64, k0: int) -> Float64:
    """(A,) distance of each anchor to its k0-th neighbour, or to its last when it has fewer.

    Where that is 0 (many equal images) the first positive distance stands in, and 1 where there is none.
    """
    counts = np.diff(offsets)
    scales = np.ones(len(counts))
    some = np.flatnonzero(counts)
    scales[some] = distances[offsets[some] + np.minimum(counts[some], k0) - 1]
    # Distances ascend, so the zeros of a list are its first entries.
    zeros = np.diff(np.concatenate([[0], np.cumsum(distances == 0)])[offsets])
    flat = some[scales[some] == 0]
    positive = flat[zeros[flat] < counts[flat]]
    scales[flat] = 1.0
    scales[positive] = distances[offsets[positive] + zeros[positive]]
    return scales


def distance_ratios(distances: npt.NDArray[np.floating], offsets: Int64, k0: int) -> Float64:
    """(E,) distance of every entry over its anchor's local scale."""
    ratios: Float64 = distances / np.repeat(local_scales(distances, offsets, k0), np.diff(offsets))
    return ratios


def calibration_anchors(count: int, fraction: float, seed: int) -> Int64:
    """Anchors whose ratios decide the band edges: a share of them, at least 10 000, at most all. Ascending."""
    wanted = min(count, max(int(np.ceil(fraction * count)), MIN_CALIBRATION_ANCHORS))
    if wanted == count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False))


def band_edges(ratios: Float64) -> Float64:
    """(6,) percentiles of the ratios; empty when there is no ratio at all."""
    return np.percentile(ratios, PERCENTILES) if len(ratios) else np.empty(0)


def assign_bands(ratios: Float64, edges: Float64) -> Int64:
    """(E,) band of each ratio: 0, the hardest, below the first edge, to 6 from the last edge on."""
    return np.searchsorted(edges, ratios, side="right").astype(np.int64)
