"""The demo camera against textbook formulas written another way."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from spatial_core.demo.camera import FIELD_OF_VIEW_DEG, Camera, Plane, Vector, inverse, to_degrees

SIZE_PX = 640
POSITIONS = [(3.0, -4.0, 2.5), (-30.0, 12.0, 1.9), (0.5, 25.0, 2.5)]
TARGET = (6.0, 9.0, 5.5)


def reference_pixel(camera: Camera, point: Vector) -> npt.NDArray[np.float64]:
    """Pinhole projection by rotation matrices: turn to the heading, tilt by the pitch, divide by depth."""
    yaw, pitch = np.radians(camera.heading_deg), np.radians(camera.pitch_deg)
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]])
    x, ahead, up = tilt @ turn @ (np.array(point) - np.array(camera.position))
    focal = SIZE_PX / 2 / np.tan(np.radians(FIELD_OF_VIEW_DEG) / 2)
    return np.array([SIZE_PX / 2 + focal * x / ahead, SIZE_PX / 2 - focal * up / ahead])


@pytest.mark.parametrize("position", POSITIONS)
def test_the_target_is_in_the_middle_of_the_picture(position: Vector) -> None:
    camera = Camera.aimed(position, TARGET, SIZE_PX)

    assert camera.project(TARGET) == pytest.approx((SIZE_PX / 2, SIZE_PX / 2), abs=1e-6)


@pytest.mark.parametrize("position", POSITIONS)
def test_projection_agrees_with_rotation_matrices(position: Vector) -> None:
    camera = Camera.aimed(position, TARGET, SIZE_PX)

    for point in [(6.5, 9.5, 4.0), (4.0, 10.0, 8.0), (7.0, 8.0, 0.0)]:
        assert camera.project(point) == pytest.approx(reference_pixel(camera, point), abs=1e-6)


@pytest.mark.parametrize("position", POSITIONS)
def test_homography_maps_metres_on_a_plane_to_pixels_and_back(position: Vector) -> None:
    camera = Camera.aimed(position, TARGET, SIZE_PX)
    plane = Plane((2.0, 9.0, 12.0), (math.cos(0.3), math.sin(0.3), 0.0), (0.0, 0.0, -1.0), 10.0, 12.0)
    forward, back = np.array(camera.homography(plane)), np.array(inverse(camera.homography(plane)))

    for right, down in [(0.0, 0.0), (10.0, 12.0), (3.3, 7.1)]:
        x, y, w = forward @ (right, down, 1.0)
        assert (x / w, y / w) == pytest.approx(camera.project(plane.point(right, down)), abs=1e-6)
        u, v, k = back @ (x / w, y / w, 1.0)
        assert (u / k, v / k) == pytest.approx((right, down), abs=1e-6)


def test_what_is_behind_the_camera_is_cut_off() -> None:
    camera = Camera((0.0, 0.0, 2.0), 0.0, 0.0, SIZE_PX)
    ahead = [(-1.0, 5.0, 2.0), (1.0, 5.0, 2.0), (1.0, 5.0, 4.0), (-1.0, 5.0, 4.0)]

    assert len(camera.project_polygon(ahead)) == 4
    assert camera.project_polygon([(x, -y, z) for x, y, z in ahead]) == []
    wall_beside = [(2.0, -50.0, 0.0), (2.0, 50.0, 0.0), (2.0, 50.0, 9.0), (2.0, -50.0, 9.0)]
    assert all(x > SIZE_PX / 2 for x, _ in camera.project_polygon(wall_beside))


def test_degrees_keep_distances() -> None:
    """Great-circle distance by the haversine formula equals the distance in metres."""
    a, b = (120.0, -340.0), (131.0, -322.0)
    (lat1, lon1), (lat2, lon2) = to_degrees(*a), to_degrees(*b)
    p1, p2 = math.radians(lat1), math.radians(lat2)
    half = math.sin((p2 - p1) / 2) ** 2 + math.cos(p1) * math.cos(p2) * math.sin(math.radians(lon2 - lon1) / 2) ** 2

    assert 2 * 6_371_008.8 * math.asin(math.sqrt(half)) == pytest.approx(math.dist(a, b), abs=0.01)
