"""Distances on the ground, against closed forms and a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_core.geo.sphere import EARTH_RADIUS_M, check_degrees, haversine_m, nearest_m, unit_vectors

degrees = st.tuples(st.floats(-89.9, 89.9), st.floats(-180, 180))


def law_of_cosines(lat1: float, lon1: float, lat2: float, lon2: float) -> float:
    a, b = math.radians(lat1), math.radians(lat2)
    cosine = math.sin(a) * math.sin(b) + math.cos(a) * math.cos(b) * math.cos(math.radians(lon2 - lon1))
    return EARTH_RADIUS_M * math.acos(max(-1.0, min(1.0, cosine)))


def test_one_degree_of_latitude_is_a_known_length() -> None:
    one = haversine_m(np.array([0.0]), np.array([0.0]), np.array([1.0]), np.array([0.0]))
    assert one[0] == pytest.approx(math.pi * EARTH_RADIUS_M / 180)


def test_antipodes_are_half_a_circumference_apart() -> None:
    far = haversine_m(np.array([10.0]), np.array([20.0]), np.array([-10.0]), np.array([-160.0]))
    assert far[0] == pytest.approx(math.pi * EARTH_RADIUS_M)


@settings(deadline=None)
@given(degrees, degrees)
def test_agrees_with_the_law_of_cosines(first: tuple[float, float], second: tuple[float, float]) -> None:
    ours = haversine_m(*(np.array([value]) for value in (*first, *second)))
    # The law of cosines loses precision at short range; there the chord is the witness.
    expected = law_of_cosines(*first, *second)
    assert ours[0] == pytest.approx(expected, rel=1e-6, abs=1.0)
    ends = unit_vectors(np.array([first[0], second[0]]), np.array([first[1], second[1]]))
    chord = float(np.linalg.norm(ends[0] - ends[1]))
    assert ours[0] == pytest.approx(2 * EARTH_RADIUS_M * math.asin(min(1.0, chord / 2)), rel=1e-6, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(0, 40), st.floats(1, 500))
def test_nearest_agrees_with_a_plain_loop(seed: int, count: int, others: int, limit_m: float) -> None:
    rng = np.random.default_rng(seed)
    # A street across the antimeridian: the tree must not see an edge there.
    lat, lon = rng.normal(60, 1e-3, count), (rng.normal(180, 2e-3, count) + 180) % 360 - 180
    other_lat, other_lon = rng.normal(60, 1e-3, others), (rng.normal(180, 2e-3, others) + 180) % 360 - 180
    found = nearest_m(lat, lon, other_lat, other_lon, limit_m)
    for i in range(count):
        metres = [float(haversine_m(lat[i], lon[i], other_lat[j], other_lon[j])) for j in range(others)]
        near = [value for value in metres if value <= limit_m]
        assert found[i] == (pytest.approx(min(near), abs=1e-6) if near else np.inf)


def test_check_degrees_lists_what_is_not_on_earth() -> None:
    lat = np.array([0.0, np.nan, 90.0, 90.1, -45.0, np.inf])
    lon = np.array([0.0, 0.0, -180.0, 0.0, 180.5, 0.0])
    assert check_degrees(lat, lon).tolist() == [1, 3, 4, 5]
