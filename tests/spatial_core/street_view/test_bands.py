"""Scales, edges and bands against plain loops."""

from __future__ import annotations

import bisect

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_core.street_view.bands import (
    PERCENTILES,
    assign_bands,
    band_edges,
    calibration_anchors,
    distance_ratios,
    local_scales,
)

lists = st.lists(st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0, 7.5]), max_size=8).map(sorted), max_size=12)


def flat(groups: list[list[float]]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    offsets = np.concatenate([[0], np.cumsum([len(group) for group in groups], dtype=np.int64)]).astype(np.int64)
    return np.array([value for group in groups for value in group], np.float32), offsets


def plain_scale(distances: list[float], k0: int) -> float:
    if not distances:
        return 1.0
    scale = distances[k0 - 1] if len(distances) >= k0 else distances[-1]
    if scale > 0:
        return scale
    return next((value for value in distances if value > 0), 1.0)


@settings(deadline=None)
@given(lists, st.integers(1, 9))
def test_scales_and_ratios_agree_with_a_loop(groups: list[list[float]], k0: int) -> None:
    distances, offsets = flat(groups)
    expected = [plain_scale(group, k0) for group in groups]
    assert local_scales(distances, offsets, k0).tolist() == expected
    ratios = [value / scale for group, scale in zip(groups, expected, strict=True) for value in group]
    assert distance_ratios(distances, offsets, k0).tolist() == ratios


@settings(deadline=None)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=60))
def test_bands_agree_with_bisection(values: list[float]) -> None:
    ratios = np.array(values)
    edges = band_edges(ratios)
    assert edges.tolist() == [float(np.percentile(ratios, percentile)) for percentile in PERCENTILES]
    bands = assign_bands(ratios, edges)
    assert bands.tolist() == [bisect.bisect_right(edges.tolist(), value) for value in values]
    assert set(bands.tolist()) <= set(range(7))


def test_a_ratio_on_an_edge_is_in_the_easier_band() -> None:
    assert assign_bands(np.array([0.9, 1.0, 6.0, 6.1]), np.arange(1.0, 7.0)).tolist() == [0, 1, 6, 6]


def test_nothing_to_calibrate_on_gives_no_edges() -> None:
    edges = band_edges(np.empty(0))
    assert edges.tolist() == []
    assert assign_bands(np.empty(0), edges).tolist() == []


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(50, 0.03, 50), (10_000, 0.03, 10_000), (20_000, 0.03, 10_000), (400_001, 0.03, 12_001)],
)
def test_calibration_takes_a_share_at_least_ten_thousand_at_most_all(
    count: int, fraction: float, expected: int
) -> None:
    anchors = calibration_anchors(count, fraction, 7)
    assert len(anchors) == expected == len(set(anchors.tolist()))
    assert anchors.tolist() == sorted(anchors.tolist())
    assert anchors.min() >= 0
    assert anchors.max() < count
    if expected < count:
        chosen = np.random.default_rng(7).choice(count, expected, replace=False)
        assert set(anchors.tolist()) == set(chosen.tolist())
