"""Geometry of the demo city: metres to degrees, and a pinhole camera that maps facade planes to pixels.

World axes are metres east, north and up of `ORIGIN`. Everything is plain Python arithmetic on a handful of numbers, no
LAPACK, so that the same seed gives the same pixels on every processor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

Vector = tuple[float, float, float]
Pixel = tuple[float, float]
Matrix = tuple[Vector, Vector, Vector]

EARTH_RADIUS_M = 6_371_008.8
# In the Bay of Biscay, where no real building can be mistaken for one of ours.
ORIGIN = (45.0, -5.0)
FIELD_OF_VIEW_DEG = 62.0
NEAR_M = 0.4


def to_degrees(east_m: float, north_m: float) -> tuple[float, float]:
    """Latitude and longitude of a point given in metres from `ORIGIN`."""
    lat = ORIGIN[0] + math.degrees(north_m / EARTH_RADIUS_M)
    lon = ORIGIN[1] + math.degrees(east_m / (EARTH_RADIUS_M * math.cos(math.radians(lat))))
    return lat, lon


def add(a: Vector, b: Vector, scale: float = 1.0) -> Vector:
    """a + scale * b."""
    return (a[0] + scale * b[0], a[1] + scale * b[1], a[2] + scale * b[2])


def dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@dataclass(frozen=True)
class Plane:
    """A rectangle in the world: `corner` is its top left as seen from outside.

    Args:
        corner: top left corner, metres.
        right: unit vector to the right.
        down: unit vector downwards along the rectangle.
        width_m, height_m: its size.
    """

    corner: Vector
    right: Vector
    down: Vector
    width_m: float
    height_m: float

    def point(self, right_m: float, down_m: float) -> Vector:
        return add(add(self.corner, self.right, right_m), self.down, down_m)

    @property
    def outline(self) -> list[Vector]:
        """Four corners, clockwise from the top left."""
        w, h = self.width_m, self.height_m
        return [self.point(0, 0), self.point(w, 0), self.point(w, h), self.point(0, h)]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera without roll; heading and pitch as in the data set's `d` lines.

    Args:
        position: metres.
        heading_deg: 0 = north, clockwise.
        pitch_deg: 0 = horizon, upwards positive.
        size_px: side of the square picture.
    """

    position: Vector
    heading_deg: float
    pitch_deg: float
    size_px: int

    @classmethod
    def aimed(cls, position: Vector, target: Vector, size_px: int) -> Camera:
        """The camera at `position` whose picture has `target` in its centre."""
        east, north, up = add(target, position, -1)
        heading = math.degrees(math.atan2(east, north)) % 360
        return cls(position, heading, math.degrees(math.atan2(up, math.hypot(east, north))), size_px)

    @cached_property
    def focal_px(self) -> float:
        return self.size_px / (2 * math.tan(math.radians(FIELD_OF_VIEW_DEG / 2)))

    @cached_property
    def axes(self) -> Matrix:
        """Unit vectors to the right of, up from, and along the line of sight."""
        heading, pitch = math.radians(self.heading_deg), math.radians(self.pitch_deg)
        sh, ch, sp, cp = math.sin(heading), math.cos(heading), math.sin(pitch), math.cos(pitch)
        return (ch, -sh, 0.0), (-sh * sp, -ch * sp, cp), (sh * cp, ch * cp, sp)

    def to_camera(self, point: Vector) -> Vector:
        """A world point as metres (right, up, ahead) of the camera."""
        offset = add(point, self.position, -1)
        right, up, ahead = self.axes
        return dot(offset, right), dot(offset, up), dot(offset, ahead)

    def _pixel(self, seen: Vector) -> Pixel:
        centre = self.size_px / 2
        return centre + self.focal_px * seen[0] / seen[2], centre - self.focal_px * seen[1] / seen[2]

    def project(self, point: Vector) -> Pixel:
        """Pixel (x right, y down, corner of the picture = 0, 0) of a point in front of the camera."""
        return self._pixel(self.to_camera(point))

    def project_polygon(self, outline: Sequence[Vector]) -> list[Pixel]:
        """Pixels of the part of a flat polygon that lies in front of the camera; empty when none does."""
        seen = [self.to_camera(point) for point in outline]
        clipped: list[Vector] = []
        for here, there in zip(seen, [*seen[1:], seen[0]], strict=True):
            if here[2] >= NEAR_M:
                clipped.append(here)
            if (here[2] >= NEAR_M) != (there[2] >= NEAR_M):
                clipped.append(add(here, add(there, here, -1), (NEAR_M - here[2]) / (there[2] - here[2])))
        return [self._pixel(point) for point in clipped]

    def homography(self, plane: Plane) -> Matrix:
        """3x3 matrix from metres on `plane` (right, down, 1) to homogeneous pixels."""
        right, up, ahead = self.axes
        offset = add(plane.corner, self.position, -1)
        columns = [(dot(v, right), dot(v, up), dot(v, ahead)) for v in (plane.right, plane.down, offset)]
        centre, focal = self.size_px / 2, self.focal_px
        x, y, z = (
            [focal * c[0] + centre * c[2] for c in columns],
            [-focal * c[1] + centre * c[2] for c in columns],
            [c[2] for c in columns],
        )
        return (x[0], x[1], x[2]), (y[0], y[1], y[2]), (z[0], z[1], z[2])


def inverse(m: Matrix) -> Matrix:
    """Inverse of a 3x3 matrix up to scale (its adjugate), which is all a homography needs."""
    (a, b, c), (d, e, f), (g, h, i) = m
    return (
        (e * i - f * h, c * h - b * i, b * f - c * e),
        (f * g - d * i, a * i - c * g, c * d - a * f),
        (d * h - e * g, b * g - a * h, a * e - b * d),
    )
