"""The building index against dictionaries filled in plain loops."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_core.errors import ArtifactError
from spatial_core.street_view.building_index import (
    BuildingIndex,
    index_buildings,
    merge_indices,
    require_unique_patches,
)

Columns = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]

images = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=40)


def columns(pairs: list[tuple[int, int]]) -> Columns:
    pairs_array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    patch = np.random.default_rng(0).permutation(len(pairs)).astype(np.int64)
    return pairs_array[:, 0], pairs_array[:, 1], patch


def place(patch: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    return patch / 100.0, -patch / 100.0


def as_dict(index: BuildingIndex) -> dict[tuple[int, int], tuple[int, int, float, float]]:
    return {
        (int(index.dataset[i]), int(index.target[i])): (
            int(index.images[i]),
            int(index.patch[i]),
            float(index.lat[i]),
            float(index.lon[i]),
        )
        for i in range(len(index))
    }


@settings(deadline=None)
@given(images, st.integers(0, 40))
def test_counts_and_places_agree_with_a_loop(pairs: list[tuple[int, int]], cut: int) -> None:
    dataset, target, patch = columns(pairs)
    lat, lon = place(patch)
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    for pair, number in zip(pairs, patch.tolist(), strict=True):
        seen[pair].append(number)
    expected = {pair: (len(found), min(found), min(found) / 100.0, -min(found) / 100.0) for pair, found in seen.items()}
    whole = index_buildings(dataset, target, patch, lat, lon)
    assert as_dict(whole) == expected
    halves = [
        index_buildings(dataset[part], target[part], patch[part], lat[part], lon[part])
        for part in (slice(0, cut), slice(cut, None))
    ]
    assert as_dict(merge_indices(halves)) == expected
    assert whole.disagreeing == len(pairs) - len(expected)  # every image of a building was given another place


@settings(deadline=None)
@given(images, images)
def test_rows_finds_each_building_and_no_other(known: list[tuple[int, int]], asked: list[tuple[int, int]]) -> None:
    dataset, target, patch = columns(known)
    index = index_buildings(dataset, target, patch, *place(patch))
    rows = index.rows(*columns(asked)[:2])
    for pair, row in zip(asked, rows, strict=True):
        assert (row >= 0) == (pair in known)
        assert row < 0 or (int(index.dataset[row]), int(index.target[row])) == pair


def test_no_files_make_an_empty_index() -> None:
    assert len(merge_indices([])) == 0


def test_numbers_at_the_end_of_int64_are_ordinary() -> None:
    last = np.array([2**63 - 1, 2**63 - 1], dtype=np.int64)
    index = index_buildings(last, last, np.array([1, 2]), np.zeros(2), np.zeros(2))
    assert index.images.tolist() == [2]
    assert index.rows(last[:1], last[:1]).tolist() == [0]


def test_a_repeated_image_is_named() -> None:
    with pytest.raises(ArtifactError, match=r"a\.parquet: streetview_image_id 0007_3 occurs more than once"):
        require_unique_patches(np.array([7, 8, 7]), np.array([3, 3, 3]), "a.parquet")
    require_unique_patches(np.array([7, 8]), np.array([3, 3]), "a.parquet")
