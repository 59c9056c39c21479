"""The grid: sizes of its cells, and that it never moves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_core.geo.grid import grid_cells
from spatial_core.geo.sphere import haversine_m


@settings(deadline=None)
@given(st.floats(-85, 85), st.floats(-180, 179.9), st.sampled_from([100.0, 500.0, 2000.0]))
def test_a_cell_has_the_side_it_should(lat: float, lon: float, side_m: float) -> None:
    # Walk east and north in steps of 1 % of the side and see where the cell changes.
    step_lat = side_m / 100 / 111_195
    step_lon = step_lat / float(np.cos(np.radians(lat)))
    north = np.asarray(lat + np.arange(350) * step_lat, np.float64)
    rows, _ = grid_cells(north, np.full(350, lon), side_m)
    changes = np.flatnonzero(np.diff(rows))
    assert len(changes) >= 3 or lat > 84.9
    assert np.diff(changes) == pytest.approx(100, abs=1.01)
    east = np.asarray(lon + np.arange(350) * step_lon, np.float64)
    _, columns = grid_cells(np.full(350, lat), (east + 180) % 360 - 180, side_m)
    widths = np.diff(np.flatnonzero(np.diff(columns)))
    assert widths == pytest.approx(100, abs=2.01 if side_m < 2000 else 3.01)


@settings(deadline=None)
@given(st.floats(-90, 90), st.floats(-180, 180), st.sampled_from([30.0, 500.0, 5_000_000.0]))
def test_points_of_one_cell_lie_within_its_diagonal(lat: float, lon: float, side_m: float) -> None:
    rng = np.random.default_rng(0)
    near_lat = np.clip(lat + rng.uniform(-2, 2, 200) * side_m / 111_195, -90, 90)
    near_lon = np.clip(lon + rng.uniform(-2, 2, 200) * side_m / 111_195, -180, 180)
    row, column = grid_cells(np.array([lat]), np.array([lon]), side_m)
    rows, columns = grid_cells(near_lat, near_lon, side_m)
    together = (rows == row) & (columns == column)
    metres = haversine_m(near_lat[together], near_lon[together], np.array(lat), np.array(lon))
    # Beside a pole a band holds a handful of cells, each up to twice as wide as high.
    assert (metres <= side_m * 2.7).all()


def test_the_date_line_is_one_meridian() -> None:
    lat = np.array([12.0, 12.0])
    _, column = grid_cells(lat, np.array([-180.0, 180.0]), 500.0)
    assert column[0] == column[1]


def test_a_cell_does_not_depend_on_the_other_points() -> None:
    rng = np.random.default_rng(1)
    lat, lon = rng.uniform(-80, 80, 500), rng.uniform(-180, 180, 500)
    together = grid_cells(lat, lon, 500.0)
    alone = [grid_cells(lat[i : i + 1], lon[i : i + 1], 500.0) for i in range(500)]
    assert together[0].tolist() == [int(row[0]) for row, _ in alone]
    assert together[1].tolist() == [int(column[0]) for _, column in alone]
