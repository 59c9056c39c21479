"""Draws one house on the canvas: roof, gable, front in its light, and what stands out of the wall."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from spatial_core.demo.camera import Plane, Vector, add, dot
from spatial_core.demo.facade import LEVELS, PIXELS_PER_M, Facade, darker, paint_facade
from spatial_core.demo.layout import Building
from spatial_core.demo.looks import Look
from spatial_core.demo.view import Canvas

_DEPTH_M = 9.0
_STRIPS = 8
_UP: Vector = (0.0, 0.0, 1.0)


@lru_cache(maxsize=24)
def _painted(look: Look) -> Facade:
    return paint_facade(look)


class House:
    """A building as one picture shows it."""

    def __init__(self, canvas: Canvas, building: Building) -> None:
        self.canvas, self.building, self.look, self.light = canvas, building, building.look, canvas.light
        self.plane = canvas.street.facade(building)
        self.normal = canvas.street.normal(building.side)
        self.sunny = self.light.on_wall(self.normal)
        self.distance_m = self._distance()

    def draw(self) -> None:
        self._roof_and_gables()
        stretch = self._stretch()
        if stretch is not None:
            start, end = stretch
            part = Plane(self.plane.point(start, 0), self.plane.right, self.plane.down, end - start, self.look.eaves_m)
            self.canvas.paste(part, self._front(start, end))
            self._balconies()
            self._awnings()

    def _distance(self) -> float:
        """From the camera to the nearest point of the front."""
        offset = add(self.canvas.camera.position, self.plane.corner, -1)
        across = min(max(dot(offset, self.plane.right), 0.0), self.plane.width_m)
        down = min(max(dot(offset, self.plane.down), 0.0), self.plane.height_m)
        return math.dist(self.canvas.camera.position, self.plane.point(across, down))

    def _roof_and_gables(self) -> None:
        look, canvas, plane, inward = self.look, self.canvas, self.plane, (-self.normal[0], -self.normal[1], 0.0)
        left, right = plane.point(0, 0), plane.point(plane.width_m, 0)
        rise, run = look.roof_m, 0.7 if look.style.roof == "mansard" else 1.3 * look.roof_m
        if rise:
            tilt = rise / math.hypot(rise, run)
            slope = (tilt * self.normal[0], tilt * self.normal[1], math.sqrt(1 - tilt * tilt))
            ridge = [add(add(corner, inward, run), _UP, rise) for corner in (right, left)]
            canvas.fill([left, right, *ridge], canvas.lit(look.roof, self.light.on_wall(slope), self.distance_m))
            if look.style.roof == "mansard":
                self._dormers()
        for corner, outward in ((left, add((0.0, 0.0, 0.0), plane.right, -1)), (right, plane.right)):
            if dot(add(canvas.camera.position, corner, -1), outward) <= 0:
                continue
            back = add(corner, inward, _DEPTH_M)
            top = [back, add(add(corner, inward, run), _UP, rise), corner] if rise else [back, corner]
            foot = [add(point, _UP, -look.eaves_m) for point in (corner, back)]
            colour = canvas.lit(darker(look.wall, 0.86), self.light.on_wall(outward), self.distance_m)
            canvas.fill([*top, *foot], colour)

    def _dormers(self) -> None:
        look = self.look
        for bay in range(0, look.bays, 1 + look.bands % 2):
            middle = look.margin_m + (bay + 0.5) * look.bay_m
            for half, low, high, colour in ((0.62, 0.15, 1.75, look.trim), (0.45, 0.3, 1.5, (58, 64, 72))):
                spots = [(middle - half, low), (middle + half, low), (middle + half, high), (middle - half, high)]
                outline = [self.plane.point(x, -up) for x, up in spots]
                self.canvas.fill(outline, self.canvas.lit(colour, self.sunny, self.distance_m))

    def _stretch(self) -> tuple[float, float] | None:
        """The part of the front, metres from its left, that may be in the picture."""
        plane, wide = self.plane, self.plane.width_m / _STRIPS
        seen = []
        for number in range(_STRIPS):
            strip = Plane(plane.point(number * wide, 0), plane.right, plane.down, wide, plane.height_m)
            if self.canvas.visible(self.canvas.camera.project_polygon(strip.outline)) is not None:
                seen.append(number)
        return (seen[0] * wide, (seen[-1] + 1) * wide) if seen else None

    def _front(self, start_m: float, end_m: float) -> Image.Image:
        """A stretch of the front in this light: glass, sunlight, and the shadow of the houses opposite."""
        light, canvas, facade = self.light, self.canvas, _painted(self.look)
        detail = math.log2(max(1.0, PIXELS_PER_M * self.distance_m / canvas.camera.focal_px))
        level = min(LEVELS - 1, int(detail))
        colours, panes = facade.colours[level], facade.panes[level]
        scale = colours.width / self.look.width_m
        cut = (round(start_m * scale), 0, round(end_m * scale), colours.height)
        colours, panes = colours.crop(cut), panes.crop(cut)
        front = colours.point(canvas.table(light.ambient, self.distance_m))
        if self.sunny[0] > light.ambient[0] + 0.02:
            sunny = colours.point(canvas.table(self.sunny, self.distance_m))
            front.paste(sunny, (0, 0), self._sunlit(start_m, colours.size))
        tinted = panes.copy()
        tinted.putpalette(self._glass())
        front.paste(tinted.convert("RGB"), (0, 0), panes.point([0] + [225] * 255))
        return front

    def _sunlit(self, start_m: float, size: tuple[int, int]) -> Image.Image:
        """Mask of the stretch from `start_m` that the houses across the street do not shade."""
        street, building, look, sun = self.canvas.street, self.building, self.look, self.light.sun
        scale = size[1] / look.eaves_m
        mask = Image.new("L", size, 255)
        draw = ImageDraw.Draw(mask)
        facing = dot(self.normal, sun)
        drift = street.width_m * dot(street.direction(1.0, 0.0), sun) / facing
        drop = street.width_m * sun[2] / facing
        for other in street.buildings:
            top = other.look.eaves_m - drop
            if other.side == building.side or top <= 0:
                continue
            start = other.start_m - drift - building.start_m
            end = start + other.look.width_m
            if building.side < 0:
                start, end = look.width_m - end, look.width_m - start
            left, right = (start - start_m) * scale, (end - start_m) * scale
            if right > 0 and left < size[0]:
                draw.rectangle((left, (look.eaves_m - top) * scale, right, size[1]), fill=0)
        return mask

    def _glass(self) -> list[int]:
        """Palette of pane number -> colour: by day a darkened sky, some with curtains; at dusk some lit."""
        light = self.light
        depth, inside = self.canvas.view.random.random((2, 256, 1))
        colours = 24 + (0.12 + 0.3 * depth) * np.array(light.horizon)
        colours = np.where(inside > 0.8, np.array(self.canvas.lit((206, 200, 188), light.ambient, 0.0)), colours)
        if light.dusk:
            colours = np.where(inside < 0.4, (0.7 + 0.3 * depth) * np.array((252, 206, 134)), colours)
        levels: list[int] = np.rint(colours).astype(int).ravel().tolist()
        return levels

    def _balconies(self) -> None:
        """Slabs with railings; standing out of the wall, they move against it from picture to picture."""
        look, plane, canvas, far = self.look, self.plane, self.canvas, self.distance_m
        rail = canvas.lit((52, 54, 58), self.sunny, far)
        for storey, bay in look.balcony_bays:
            left = look.margin_m + bay * look.bay_m + 0.15
            right = left + look.bay_m - 0.3
            down = look.eaves_m - look.ground_m - storey * look.storey_m
            edge = [plane.point(x, down) for x in (left, right)]
            front = [add(point, self.normal, 0.9) for point in edge]
            below = canvas.lit(darker(look.trim, 0.55), self.light.ambient, far)
            canvas.fill([edge[0], edge[1], front[1], front[0]], below)
            low = [add(point, _UP, -0.16) for point in front]
            canvas.fill([front[0], front[1], low[1], low[0]], canvas.lit(look.trim, self.sunny, far))
            bars = 9
            for step in range(bars + 1):
                foot = add(front[0], add(front[1], front[0], -1), step / bars)
                canvas.line(foot, add(foot, _UP, 1.0), rail, 2)
            top = [add(point, _UP, 1.0) for point in (*front, *edge)]
            for start, end in ((0, 1), (0, 2), (1, 3)):
                canvas.line(top[start], top[end], rail, 3)

    def _awnings(self) -> None:
        look, plane, stripes = self.look, self.plane, 6
        wide = (look.bay_m - 0.2) / stripes
        high = look.eaves_m - look.ground_m + 0.7
        for bay, colour, striped in look.awnings:
            left = look.margin_m + bay * look.bay_m + 0.1
            for stripe in range(stripes):
                tint = (236, 232, 224) if striped and stripe % 2 else colour
                x0, x1 = left + stripe * wide, left + (stripe + 1) * wide
                outer = [add(plane.point(x, high + 0.65), self.normal, 1.2) for x in (x1, x0)]
                corners = [plane.point(x0, high), plane.point(x1, high), *outer]
                self.canvas.fill(corners, self.canvas.lit(tint, self.sunny, self.distance_m))
