"""Leakage against a plain double loop, and planted neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_core.geo.sphere import haversine_m
from spatial_core.street_view.building_index import BuildingIndex
from spatial_core.street_view.leakage import measure_leakage


def buildings(lat: np.ndarray, lon: np.ndarray) -> BuildingIndex:
    number = np.arange(len(lat))
    return BuildingIndex(number * 0, number, np.full(len(lat), 2, np.int32), number, lat, lon)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 60))
def test_shares_agree_with_a_double_loop(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    index = buildings(48 + rng.normal(0, 5e-4, count), 11 + rng.normal(0, 5e-4, count))
    split = rng.integers(-1, 3, count).astype(np.int8)
    measured = measure_leakage(index, split, (25.0, 50.0))
    for name, code in (("val", 1), ("test", 2)):
        held_out = np.flatnonzero(split == code)
        for distance in (25.0, 50.0):
            near = 0
            for i in held_out:
                reach = [
                    float(haversine_m(index.lat[i], index.lon[i], index.lat[j], index.lon[j]))
                    for j in np.flatnonzero(split == 0)
                ]
                near += any(metres <= distance for metres in reach)
            assert measured[name].near[distance] == near
        assert measured[name].buildings == len(held_out)


def test_planted_neighbours_are_counted_at_the_right_distance() -> None:
    metre = 1 / 111_195.08
    # One training building; test buildings 10, 30, 49 and 60 m north of it; a dropped one beside a test building.
    lat = 50 + np.array([0.0, 10, 30, 49, 60, 61]) * metre
    record = measure_leakage(buildings(lat, np.full(6, 3.0)), np.array([0, 2, 2, 2, 2, -1], np.int8))["test"].to_json()
    assert record == {
        "buildings": 4,
        "buildings_within_25m": 1,
        "share_within_25m": pytest.approx(0.25),
        "buildings_within_50m": 3,
        "share_within_50m": pytest.approx(0.75),
    }


def test_no_held_out_building_is_a_share_of_nothing() -> None:
    record = measure_leakage(buildings(np.zeros(2), np.zeros(2)), np.zeros(2, np.int8))["val"].to_json()
    assert record["share_within_25m"] == 0.0
