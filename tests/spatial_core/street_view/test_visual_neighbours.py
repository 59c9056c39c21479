"""Neighbour lists against plain loops over all images, with and without a minimum ground distance."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_core.geo.sphere import haversine_m
from spatial_core.retrieval.search import ExactSearch
from spatial_core.street_view import visual_neighbours
from spatial_core.street_view.fingerprint_files import Images
from spatial_core.street_view.visual_neighbours import NeighbourFinder, joined


def street(seed: int, count: int, buildings: int, length_m: float) -> tuple[Images, np.ndarray]:
    """Images of buildings along a street, with scores on a coarse grid so that distances tie."""
    rng = np.random.default_rng(seed)
    building = rng.integers(0, buildings, count).astype(np.int32)
    metre = 1 / 111_195
    images = Images(
        pa.chunked_array([pa.array([f"0001_{i}" for i in range(count)])]),
        building,
        pa.array([f"0001_{i}" for i in range(buildings)]),
        45 + rng.uniform(0, length_m, buildings) * metre,
        np.full(buildings, 9.0),
    )
    return images, rng.integers(0, 4, (count, 3)).astype(np.float32)


def plain(
    images: Images,
    scores: np.ndarray,
    *,
    anchor: int,
    neighbors: int,
    min_m: float,
    limit: int,
) -> tuple[list[int], int]:
    """Rows of the neighbours, and how many of the first `neighbors` others stand too near."""
    distances = [float(((scores[anchor] - score) ** 2).sum()) for score in scores]
    order = sorted(range(len(scores)), key=lambda row: (distances[row], row))[:limit]
    own = images.building[anchor]
    others = [row for row in order if images.building[row] != own]

    def near(row: int) -> bool:
        b = images.building[row]
        return float(haversine_m(images.lat[own], images.lon[own], images.lat[b], images.lon[b])) < min_m

    return [row for row in others if not near(row)][:neighbors], sum(near(row) for row in others[:neighbors])


def finder(images: Images, scores: np.ndarray, neighbors: int, min_m: float, dtype: str = "float32") -> NeighbourFinder:
    return NeighbourFinder(
        ExactSearch(scores), scores, images, neighbors=neighbors, min_distance_m=min_m, dtype=dtype, block=7
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 90),
    buildings=st.integers(1, 30),
    neighbors=st.integers(1, 12),
    min_m=st.sampled_from([0.0, 30.0, 1e6]),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_lists_agree_with_a_loop(
    *, seed: int, count: int, buildings: int, neighbors: int, min_m: float, dtype: str
) -> None:
    images, scores = street(seed, count, buildings, 300)
    found = finder(images, scores, neighbors, min_m, dtype).find(np.arange(count))
    assert len(found) == count
    for anchor in range(count):
        # Without a minimum distance only `neighbors` + 50 candidates are ever looked at.
        limit = count if min_m else neighbors + visual_neighbours.MARGIN
        rows, excluded = plain(images, scores, anchor=anchor, neighbors=neighbors, min_m=min_m, limit=limit)
        mine = found.part(anchor, anchor + 1)
        assert mine.rows.tolist() == rows
        assert mine.excluded.tolist() == [excluded]
        expected = np.linalg.norm(scores[anchor].astype(np.float64) - scores[rows], axis=1)
        assert mine.distances == pytest.approx(expected, rel=1e-6)
        assert mine.distances.dtype == np.dtype(dtype)


def test_a_building_of_many_images_shortens_lists_only_without_a_minimum_distance() -> None:
    # 70 images of one building lie closest to each other: the 60 candidates of 10 neighbours are all its own.
    images, scores = street(0, 200, 20, 1e5)
    images.building[:70] = 0
    images.building[70:] = np.maximum(images.building[70:], 1)
    scores[:70], scores[70:] = scores[:70] / 100, scores[70:] + 5
    spec = finder(images, scores, 10, 0).find(np.arange(70))
    assert np.diff(spec.offsets).tolist() == [0] * 70
    ours = finder(images, scores, 10, 1.0).find(np.arange(70))
    assert np.diff(ours.offsets).tolist() == [10] * 70


def test_parts_picks_and_joins_are_the_same_lists() -> None:
    images, scores = street(3, 60, 9, 200)
    whole = finder(images, scores, 5, 30.0).find(np.arange(60))
    again = joined([whole.part(0, 13), whole.part(13, 13), whole.part(13, 60)])
    chosen = np.array([4, 5, 31, 59])
    picked, direct = whole.pick(chosen), finder(images, scores, 5, 30.0).find(chosen)
    for ours, theirs in ((again, whole), (picked, direct)):
        for name in ("offsets", "rows", "distances", "excluded"):
            assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()


def test_no_anchors_give_no_lists() -> None:
    images, scores = street(3, 60, 9, 200)
    assert len(finder(images, scores, 5, 30.0).find(np.empty(0, np.int64))) == 0
