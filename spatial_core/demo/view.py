"""One picture to make, and the canvas its pieces are drawn on: flat polygons and textured rectangles in space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from spatial_core.demo.camera import Camera, Pixel, Plane, Vector, inverse
from spatial_core.demo.layout import Panorama, Street, Target
from spatial_core.demo.light import Gains, Light
from spatial_core.demo.styles import RGB


@dataclass(frozen=True)
class View:
    """What to look at, from where, and the random streams of what is not planned.

    Args:
        random: people, lit windows, clouds, noise: different in every picture.
        traffic: the parked cars of one drive, common to all its pictures of the street.
    """

    street: Street
    target: Target
    panorama: Panorama
    size_px: int
    random: np.random.Generator
    traffic: np.random.Generator

    @cached_property
    def camera(self) -> Camera:
        stop = self.panorama
        position = self.street.place(stop.along_m, stop.across_m, stop.height_m)
        return Camera.aimed(position, self.target.point, self.size_px)

    @property
    def light(self) -> Light:
        return self.street.lights[self.panorama.drive]

    @property
    def side(self) -> int:
        """Side of the street the target is on."""
        return self.street.buildings[self.target.building].side


class Canvas:
    """The picture while it is painted, back to front."""

    def __init__(self, view: View) -> None:
        self.view, self.camera, self.light, self.street = view, view.camera, view.light, view.street
        self.size = view.size_px
        self.picture = Image.new("RGB", (self.size, self.size), view.light.horizon)
        self.draw = ImageDraw.Draw(self.picture)

    def fill(self, outline: list[Vector], colour: RGB) -> None:
        """A flat polygon."""
        pixels = self.camera.project_polygon(outline)
        if len(pixels) > 2:
            self.draw.polygon(pixels, fill=colour)

    def line(self, start: Vector, end: Vector, colour: RGB, width_px: int) -> None:
        pixels = self.camera.project_polygon([start, end])
        if len(pixels) >= 2:
            self.draw.line(pixels[:2], fill=colour, width=width_px)

    def paste(self, plane: Plane, texture: Image.Image) -> None:
        """A textured rectangle; an RGBA texture keeps its transparency."""
        outline = self.camera.project_polygon(plane.outline)
        box = self.visible(outline)
        if box is None:
            return
        x0, y0, x1, y1 = box
        (a, b, c), (d, e, f), (g, h, i) = inverse(self.camera.homography(plane))
        across, down = texture.width / plane.width_m, texture.height / plane.height_m
        c, f, i = a * x0 + b * y0 + c, d * x0 + e * y0 + f, g * x0 + h * y0 + i
        if i == 0.0:
            return
        terms = (a * across, b * across, c * across, d * down, e * down, f * down, g, h)
        # Pillow premultiplies and back around every smooth transform of RGBA, which costs more than the transform.
        smooth = Image.Resampling.NEAREST if texture.mode == "RGBA" else Image.Resampling.BILINEAR
        scaled = tuple(term / i for term in terms)
        piece = texture.transform((x1 - x0, y1 - y0), Image.Transform.PERSPECTIVE, scaled, smooth)
        if texture.mode == "RGBA":
            self.picture.paste(piece, (x0, y0), piece)
            return
        mask = Image.new("L", piece.size, 0)
        ImageDraw.Draw(mask).polygon([(x - x0, y - y0) for x, y in outline], fill=255)
        self.picture.paste(piece, (x0, y0), mask)

    def visible(self, outline: list[Pixel]) -> tuple[int, int, int, int] | None:
        """Pixel box (left, top, right, bottom) of what of a projected outline is in the picture, None for nothing."""
        if len(outline) < 3:
            return None
        xs, ys = [x for x, _ in outline], [y for _, y in outline]
        x0, x1 = max(0, math.floor(min(xs))), min(self.size, math.ceil(max(xs)) + 1)
        y0, y1 = max(0, math.floor(min(ys))), min(self.size, math.ceil(max(ys)) + 1)
        return (x0, y0, x1, y1) if x1 - x0 > 1 and y1 - y0 > 1 else None

    def lit(self, colour: RGB, gains: Gains, distance_m: float) -> RGB:
        """A surface colour under a light, faded by haze."""
        haze = min(0.8, self.light.haze * distance_m)
        r, g, b = (
            min(255, round(value * gain * (1 - haze) + far * haze))
            for value, gain, far in zip(colour, gains, self.light.horizon, strict=True)
        )
        return r, g, b

    def table(self, gains: Gains, distance_m: float) -> list[int]:
        """`lit` for whole pictures: a lookup table of 3 x 256 entries."""
        haze = min(0.8, self.light.haze * distance_m)
        grey = np.arange(256.0)
        rows = [grey * (gain * (1 - haze)) + far * haze for gain, far in zip(gains, self.light.horizon, strict=True)]
        levels: list[int] = np.minimum(np.rint(np.concatenate(rows)), 255).astype(int).tolist()
        return levels
