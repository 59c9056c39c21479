"""Renders one picture: the part of a street that one camera sees, in the light of one drive.

Painter's algorithm over flat pieces: sky, ground, backdrop, houses from far to near, then whatever stands between them
and the camera.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from spatial_core.demo import sprites
from spatial_core.demo.camera import Plane, Vector, add
from spatial_core.demo.film import develop
from spatial_core.demo.house import House
from spatial_core.demo.styles import RGB
from spatial_core.demo.view import Canvas, View

_REACH_M = 70.0
_CLUTTER_M = 45.0
_STREET_END_M = 290.0
_UP: Vector = (0.0, 0.0, 1.0)


def render(view: View) -> Image.Image:
    """The RGB picture, `size_px` square."""
    canvas = Canvas(view)
    _sky(canvas)
    _ground(canvas)
    _backdrop(canvas)
    _houses(canvas)
    _foreground(canvas)
    return develop(canvas.picture, view)


def _sky(canvas: Canvas) -> None:
    light, size = canvas.light, (canvas.size, canvas.size)
    top, low = np.array(light.zenith, float), np.array(light.horizon, float)
    rise = np.linspace(1.0, 0.0, 32)[:, None] * min(1.0, 0.5 + canvas.camera.pitch_deg / 60)
    rows = (low + (top - low) * rise).round().astype(np.uint8)[:, None, :]
    canvas.picture.paste(Image.fromarray(rows).resize(size, Image.Resampling.BILINEAR))
    if not light.dusk:
        noise = canvas.view.random.integers(0, 256, (6, 9), dtype=np.uint8)
        clouds = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        floor = 255 * (1 - light.cloud)
        strength = 0.5 if light.cloud == 1.0 else 1.3
        clouds = clouds.point([min(200, max(0, round((value - floor) * strength))) for value in range(256)])
        canvas.picture.paste((238, 240, 242), (0, 0), clouds)


def _ground(canvas: Canvas) -> None:
    """Earth, road, pavements with kerbs, and the dashes of the middle line."""
    street, half, here = canvas.street, canvas.street.width_m / 2, canvas.view.panorama.along_m
    near, far = here - 90, here + 90
    gains = canvas.light.on_wall(_UP)
    dashes = [(start, start + 2.6) for start in (6.0 * n for n in range(math.floor(near / 6), math.ceil(far / 6)))]
    pieces: list[tuple[float, float, float, float, RGB]] = [
        (near, far, -120, 120, (124, 128, 112)),
        (near, far, -half, half, (106, 106, 108)),
        *((near, far, side * (half - 3.2), side * half, (156, 152, 146)) for side in (1, -1)),
        *((near, far, side * (half - 3.4), side * (half - 3.2), (186, 184, 180)) for side in (1, -1)),
        *((start, end, -0.08, 0.08, (206, 206, 200)) for start, end in dashes),
    ]
    for start, end, low, high, colour in pieces:
        outline = [
            street.place(along, across) for along, across in ((start, low), (end, low), (end, high), (start, high))
        ]
        canvas.fill(outline, canvas.lit(colour, gains, 20))


def _backdrop(canvas: Canvas) -> None:
    """Plain blocks behind the gaps between houses."""
    street, side, here = canvas.street, canvas.view.side, canvas.view.panorama.along_m
    gains = canvas.light.on_wall(street.normal(side))
    across = side * (street.width_m / 2 + 46)
    for number in range(math.floor((here - 110) / 22), math.ceil((here + 110) / 22)):
        shade, high = 132 + 12 * (number * 7 % 5), 9.0 + 1.7 * (number * 5 % 6)
        spots = [(number * 22, 0.0), (number * 22 + 20, 0.0), (number * 22 + 20, high), (number * 22, high)]
        outline = [street.place(along, across, up) for along, up in spots]
        canvas.fill(outline, canvas.lit((shade, shade - 8, shade - 16), gains, 90))


def _houses(canvas: Canvas) -> None:
    here, side = canvas.view.panorama.along_m, canvas.view.side
    away = [(abs(b.start_m + b.look.width_m / 2 - here), b) for b in canvas.street.buildings if b.side == side]
    for _, building in sorted(away, key=lambda pair: -pair[0]):
        if abs(building.start_m + building.look.width_m / 2 - here) < _REACH_M:
            House(canvas, building).draw()


def _foreground(canvas: Canvas) -> None:
    """Cars, people, lamps and trees on the near side of the facades, far ones first."""
    view, street, side = canvas.view, canvas.street, canvas.view.side
    here, kerb = view.panorama.along_m, street.width_m / 2 - 3.4
    pieces = _parked(canvas, kerb)
    for _ in range(int(view.random.integers(0, 4))):
        spot = (here + float(view.random.uniform(-25, 25)), side * (kerb + float(view.random.uniform(0.8, 2.6))))
        kind = int(view.random.integers(sprites.PERSON_KINDS))
        pieces.append((_standing(canvas, spot, 0.6, 1.8), sprites.person(kind)))
    for lamp in street.lamps:
        if lamp[1] * side > 0 and abs(lamp[0] - here) < _CLUTTER_M:
            pieces.append((_standing(canvas, lamp, 1.0, 6.0), sprites.lamp()))
    for tree in street.trees:
        if tree.across_m * side > 0 and abs(tree.along_m - here) < _CLUTTER_M:
            plane = _standing(canvas, (tree.along_m, tree.across_m), tree.height_m * 0.75, tree.height_m)
            pieces.append((plane, sprites.tree(tree.kind, canvas.light.season)))
    table = canvas.table(canvas.light.on_wall(street.normal(side)), 10) + list(range(256))
    for plane, picture in sorted(pieces, key=lambda piece: -math.dist(canvas.camera.position, piece[0].corner)):
        if canvas.visible(canvas.camera.project_polygon(plane.outline)) is not None:
            canvas.paste(plane, picture.point(table))


def _parked(canvas: Canvas, kerb_m: float) -> list[tuple[Plane, Image.Image]]:
    """Cars along the kerb: the same ones in all pictures that one drive took of the street."""
    view, street, side = canvas.view, canvas.street, canvas.view.side
    busy = float(view.traffic.uniform(0.05, 0.6))
    along, pieces = -30.0, []
    while along < _STREET_END_M:
        picture, length, height = sprites.car(int(view.traffic.integers(sprites.CAR_KINDS)))
        if view.traffic.random() < busy and abs(along - view.panorama.along_m) < _CLUTTER_M:
            corner = street.place(along if side > 0 else along + length, side * (kerb_m - 1.1), height)
            plane = Plane(corner, street.direction(float(side), 0.0), (0.0, 0.0, -1.0), length, height)
            pieces.append((plane, picture))
        along += length + 1.2
    return pieces


def _standing(canvas: Canvas, spot: tuple[float, float], width_m: float, height_m: float) -> Plane:
    """A rectangle on the ground that faces the camera."""
    right = canvas.camera.axes[0]
    foot = canvas.street.place(*spot)
    corner = add(add(foot, right, -width_m / 2), _UP, height_m)
    return Plane(corner, right, (0.0, 0.0, -1.0), width_m, height_m)
