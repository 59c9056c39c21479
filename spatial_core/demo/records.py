"""The text beside each picture, as the 3D Street View data set writes it: a `d` line, and where aligned an `a` line."""

from __future__ import annotations

import math

import numpy as np

from spatial_core.demo.camera import Camera, Plane, inverse, to_degrees
from spatial_core.demo.layout import Target

_BOX_M = 10.0


def stem(dataset_id: int, target_id: int, patch_id: int, street_view_id: int) -> str:
    """File name without extension: `<DatasetID>_<PatchID>_<StreetViewID>_<TargetID>`."""
    return f"{dataset_id:04d}_{patch_id:07d}_{street_view_id:07d}_{target_id:07d}"


def d_line(dataset_id: int, patch_id: int, street_view_id: int, target: Target, camera: Camera) -> str:
    """Ids, target, facade normal, camera, distance, heading, pitch and roll of one picture."""
    lat, lon = to_degrees(target.point[0], target.point[1])
    car_lat, car_lon = to_degrees(camera.position[0], camera.position[1])
    nx, ny, nz = target.normal
    return (
        f"d {dataset_id} {target.target_id} {patch_id} {street_view_id} "
        f"{lat:.8f} {lon:.8f} {target.point[2]:.3f} {nx:.6f} {ny:.6f} {nz:.6f} "
        f"{car_lat:.8f} {car_lon:.8f} {camera.position[2]:.3f} {math.dist(camera.position, target.point):.4f} "
        f"{camera.heading_deg:.4f} {camera.pitch_deg:.4f} 0\n"
    )


def a_line(target: Target, facade: Plane, camera: Camera, rng: np.random.Generator) -> str:
    """Alignment of one picture, 40 numbers: patch centre, warp to the facade plane (metres), the facade square around
    the target in pixels, registration, four quality figures, and the square after registration."""
    right, down = (
        sum(axis[i] * (target.point[i] - facade.corner[i]) for i in range(3)) for axis in (facade.right, facade.down)
    )
    half = _BOX_M / 2
    corners = [(right - half, down - half), (right + half, down - half), (right + half, down + half)]
    corners.append((right - half, down + half))
    box = [value for corner in corners for value in camera.project(facade.point(*corner))]
    warp = [value for row in inverse(camera.homography(facade)) for value in row]
    warp = [value / warp[8] for value in warp]
    dx, dy = (float(shift) for shift in rng.normal(0, 2, 2))
    quality = [rng.uniform(8e4, 4e5), rng.uniform(0.45, 0.98), rng.uniform(0.55, 0.99), rng.uniform(0.01, 0.35)]
    centre = [camera.size_px / 2 + dx, camera.size_px / 2 + dy]
    registration = [1.0, 0.0, dx, 0.0, 1.0, dy, 0.0, 0.0, 1.0]
    moved = [value + (dy if i % 2 else dx) for i, value in enumerate(box)]
    numbers = [*centre, *warp, *box, *registration, *(float(value) for value in quality), *moved]
    return "a " + " ".join(f"{value:.6g}" for value in numbers) + "\n"
