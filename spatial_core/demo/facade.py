"""Paints the flat front of a building: colours, and which pixels are glass.

Glass is kept apart because it looks different in every picture: it mirrors the sky by day and is lit, or not, at dusk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from spatial_core.demo.looks import Look
from spatial_core.demo.styles import RGB, Material

PIXELS_PER_M = 40
LEVELS = 4
_PANE_IDS = 250
_TILE_PX = 480
_TILE_SEED = 20_221

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Facade:
    """A facade at several resolutions, each half of the one before.

    Args:
        colours: RGB pictures, level 0 at `PIXELS_PER_M`.
        panes: grey pictures of the same sizes; 0 where there is no glass, else a number that one window's panes share.
    """

    colours: tuple[Image.Image, ...]
    panes: tuple[Image.Image, ...]


def darker(colour: RGB, factor: float) -> RGB:
    """The colour times `factor`, clipped at 255."""
    r, g, b = (min(255, round(value * factor)) for value in colour)
    return r, g, b


def paint_facade(look: Look) -> Facade:
    """The front of one building, `look.width_m` x `look.eaves_m`."""
    pen = _Pen(look)
    pen.openings_above()
    pen.ground_floor()
    pen.ornament()
    pen.oddities()
    colours, panes = [pen.picture], [pen.glass]
    for _ in range(1, LEVELS):
        size = (max(1, colours[-1].width // 2), max(1, colours[-1].height // 2))
        colours.append(colours[-1].resize(size, Image.Resampling.BOX))
        panes.append(panes[-1].resize(size, Image.Resampling.NEAREST))
    return Facade(tuple(colours), tuple(panes))


@lru_cache(maxsize=4)
def _material(material: Material) -> npt.NDArray[np.uint16]:
    """(480, 480) brightness of a wall, 128 = unchanged; repeats in both directions."""
    rng = np.random.default_rng([_TILE_SEED, len(material)])
    side = _TILE_PX
    if material == "plaster":
        coarse = rng.integers(96, 160, (side // 6, side // 6), dtype=np.uint8)
        grain = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.int16)
        tile = 128 + (grain - 128) // 3
    else:
        height, width, joint = {"brick": (4, 12, 1), "stone": (20, 40, 1), "panel": (120, 60, 2)}[material]
        spread = {"brick": 26, "stone": 14, "panel": 6}[material]
        rows = np.arange(side) // height
        shift = np.where(rows % 2, width // 2, 0) if material != "panel" else np.zeros(side, np.int64)
        x = (np.arange(side)[None, :] + shift[:, None]) % side
        shades = rng.integers(128 - spread, 128 + spread + 1, (side // height, side // width))
        tile = shades[rows[:, None], x // width].astype(np.int16)
        seam = (x % width < joint) | (np.arange(side) % height < joint)[:, None]
        tile[seam] = 150 if material == "brick" else 100
    return np.asarray(tile, np.uint16)


def _wall(look: Look, width: int, height: int) -> Image.Image:
    """The bare wall: material times slow weathering, darker towards the ground."""
    rng = np.random.default_rng([look.texture_seed, 1])
    tile = _material(look.style.material)
    grain = np.tile(tile, (height // _TILE_PX + 1, width // _TILE_PX + 1))[:height, :width]
    stains = rng.integers(112, 144, (max(2, height // 60), max(2, width // 60)), dtype=np.uint8)
    weather = np.asarray(Image.fromarray(stains).resize((width, height), Image.Resampling.BICUBIC), np.uint16)
    shade = (grain * weather) >> 7
    damp = min(height, round(0.9 * PIXELS_PER_M))
    shade[height - damp :] = (shade[height - damp :] * np.linspace(128, 104, damp).astype(np.uint16)[:, None]) >> 7
    colour = np.array(look.wall, np.uint16)
    pixels = np.minimum((shade[:, :, None] * colour) >> 7, 255).astype(np.uint8)
    return Image.fromarray(pixels)


class _Pen:
    """Draws in metres from the lower left corner of the facade."""

    def __init__(self, look: Look) -> None:
        self.look = look
        width, height = round(look.width_m * PIXELS_PER_M), round(look.eaves_m * PIXELS_PER_M)
        self.picture = _wall(look, width, height)
        self.glass = Image.new("L", (width, height), 0)
        self._draw = ImageDraw.Draw(self.picture)
        self._draw_glass = ImageDraw.Draw(self.glass)
        self._pane = 0

    def _box(self, box: Box) -> tuple[int, int, int, int] | None:
        """(left, bottom, right, top) metres -> inclusive pixel box, or None when nothing is left of it."""
        left, bottom, right, top = box
        x0, x1 = round(left * PIXELS_PER_M), round(right * PIXELS_PER_M) - 1
        y0 = round((self.look.eaves_m - top) * PIXELS_PER_M)
        y1 = round((self.look.eaves_m - bottom) * PIXELS_PER_M) - 1
        return (x0, y0, x1, y1) if x1 >= x0 and y1 >= y0 else None

    def rect(self, box: Box, colour: RGB) -> None:
        """Opaque rectangle; removes glass below it."""
        if (pixels := self._box(box)) is not None:
            self._draw.rectangle(pixels, fill=colour)
            self._draw_glass.rectangle(pixels, fill=0)

    def pane(self, box: Box) -> None:
        if (pixels := self._box(box)) is not None:
            self._draw_glass.rectangle(pixels, fill=self._pane)

    def next_window(self) -> None:
        self._pane = self._pane % _PANE_IDS + 1

    def triangle(self, left: float, right: float, bottom: float, top: float, colour: RGB) -> None:
        points = [(left, bottom), (right, bottom), ((left + right) / 2, top)]
        eaves = self.look.eaves_m
        self._draw.polygon([(x * PIXELS_PER_M, (eaves - y) * PIXELS_PER_M) for x, y in points], fill=colour)

    def glazing(self, box: Box, frame: RGB, columns: int, rows: int, bar_m: float = 0.05) -> None:
        """A frame with `columns` x `rows` panes in it."""
        left, bottom, right, top = box
        self.rect(box, frame)
        self.next_window()
        across, up = (right - left - bar_m) / columns, (top - bottom - bar_m) / rows
        for i in range(columns):
            for j in range(rows):
                x, y = left + bar_m + i * across, bottom + bar_m + j * up
                self.pane((x, y, x + across - bar_m, y + up - bar_m))

    def _bay(self, bay: int) -> tuple[float, float]:
        left = self.look.margin_m + bay * self.look.bay_m
        return left, left + self.look.bay_m

    def window_box(self, storey: int, bay: int) -> Box:
        """Opening of a window above the ground floor."""
        look = self.look
        left, right = self._bay(bay)
        half = look.window_w * look.bay_m / 2
        floor = look.ground_m + storey * look.storey_m
        sill = floor + (0.12 if look.style.window == "french" else 0.36 * (1 - look.window_h) + 0.45)
        top = min(sill + look.window_h * look.storey_m, floor + look.storey_m - 0.25)
        return (left + right) / 2 - half, sill, (left + right) / 2 + half, top

    def openings_above(self) -> None:
        for storey in range(self.look.storeys):
            for bay in range(self.look.bays):
                self._window(storey, bay)

    def _window(self, storey: int, bay: int) -> None:
        look, kind = self.look, self.look.style.window
        left, bottom, right, top = box = self.window_box(storey, bay)
        if (storey, bay) in look.blind:
            self.rect(box, darker(look.wall, 0.82))
            return
        if look.shutter is not None:
            wide = (right - left) * 0.48
            for x in (left - wide - 0.03, right + 0.03):
                self.rect((x, bottom, x + wide, top), look.shutter)
                for step in range(int((top - bottom) / 0.16)):
                    y = bottom + 0.08 + 0.16 * step
                    self.rect((x + 0.06, y, x + wide - 0.06, y + 0.04), darker(look.shutter, 0.7))
        self.rect((left - 0.08, bottom - 0.08, right + 0.08, top + 0.08), look.trim)
        self.rect(box, darker(look.wall, 0.4))
        columns, rows = look.panes if kind in ("sash", "french", "square", "arched") else (max(2, look.panes[0]), 1)
        inner = (left + 0.06, bottom + 0.04, right - 0.06, top - 0.1)
        self.glazing(inner, darker(look.trim, 0.92), columns, rows)
        if kind == "arched":
            self._arch(left, right, top)
        self._lintel(left, right, bottom, top)

    def _arch(self, left: float, right: float, top: float) -> None:
        """Round off the upper corners with wall colour."""
        look, radius = self.look, (right - left) / 2
        for step in range(12):
            y = top - radius * 0.6 * (step + 1) / 12
            reach = 1 - step / 12
            inset = radius * (1 - (1 - reach * reach) ** 0.5)
            y1 = y + radius * 0.6 / 12 + 0.02
            self.rect((left - 0.08, y, left + inset, y1), darker(look.wall, 0.95))
            self.rect((right - inset, y, right + 0.08, y1), darker(look.wall, 0.95))

    def _lintel(self, left: float, right: float, bottom: float, top: float) -> None:
        look = self.look
        if look.style.window in ("ribbon", "grid"):
            return
        self.rect((left - 0.15, bottom - 0.18, right + 0.15, bottom - 0.06), look.trim)
        self.rect((left - 0.15, bottom - 0.24, right + 0.15, bottom - 0.18), darker(look.wall, 0.7))
        if look.lintel == 1:
            self.rect((left - 0.18, top + 0.06, right + 0.18, top + 0.26), look.trim)
        elif look.lintel == 2:
            self.triangle(left - 0.22, right + 0.22, top + 0.08, top + 0.42, look.trim)
        elif look.lintel == 3:
            self.rect((left - 0.1, top + 0.04, right + 0.1, top + 0.3), darker(look.wall, 0.78))
            middle = (left + right) / 2
            self.rect((middle - 0.09, top + 0.02, middle + 0.09, top + 0.34), look.trim)

    def ground_floor(self) -> None:
        look = self.look
        if look.base is not None:
            self.rect((0, 0, look.width_m, look.ground_m - 0.05), look.base)
            self.rect((0, look.ground_m - 0.05, look.width_m, look.ground_m + 0.07), darker(look.base, 0.7))
        self.rect((0, 0, look.width_m, 0.45), darker(look.base or look.wall, 0.72))
        for bay, use in enumerate(look.ground):
            left, right = self._bay(bay)
            middle, top = (left + right) / 2, look.ground_m - 0.75
            if use == "door":
                self.rect((middle - 0.75, 0, middle + 0.75, top + 0.15), look.trim)
                self.rect((middle - 0.55, 0.1, middle + 0.55, top - 0.5), look.door)
                for x in (middle - 0.42, middle + 0.08):
                    self.rect((x, 0.5, x + 0.34, 1.1), darker(look.door, 0.75))
                    self.rect((x, 1.3, x + 0.34, top - 0.75), darker(look.door, 1.2))
                self.glazing((middle - 0.55, top - 0.45, middle + 0.55, top), look.trim, 3, 1)
                self.rect((middle - 0.9, 0, middle + 0.9, 0.16), (150, 148, 142))
            elif use == "shop":
                self.rect((left + 0.08, 0, right - 0.08, top + 0.1), darker(look.trim, 0.6))
                self.glazing((left + 0.16, 0.5, right - 0.16, top), darker(look.door, 0.9), 2, 1, 0.07)
            elif use == "garage":
                self.rect((left + 0.15, 0, right - 0.15, top), darker(look.door, 0.8))
                for step in range(int(top / 0.35)):
                    self.rect((left + 0.15, 0.35 * step, right - 0.15, 0.35 * step + 0.05), darker(look.door, 0.55))
            else:
                half = look.window_w * look.bay_m * 0.42
                box = (middle - half, 1.1, middle + half, top - 0.1)
                self.rect((box[0] - 0.08, 1.02, box[2] + 0.08, top - 0.02), look.trim)
                self.glazing(box, darker(look.trim, 0.9), *look.panes)
        for first, count, colour, lettering, seed in look.signs:
            self._sign(self._bay(first)[0] + 0.05, self._bay(first + count - 1)[1] - 0.05, colour, lettering, seed)

    def _sign(self, left: float, right: float, colour: RGB, lettering: RGB, seed: int) -> None:
        rng = np.random.default_rng(seed)
        bottom, top = self.look.ground_m - 0.68, self.look.ground_m - 0.06
        self.rect((left, bottom, right, top), colour)
        length = (right - left) * float(rng.uniform(0.4, 0.85))
        x = (left + right - length) / 2
        end = x + length
        while x < end:
            wide = float(rng.uniform(0.12, 0.3))
            if rng.random() < 0.85:
                low, high = bottom + 0.14, top - (0.14 if rng.random() < 0.4 else 0.24)
                self.rect((x, low, min(x + wide, end), high), lettering)
                if rng.random() < 0.6:
                    hole = (x + wide * 0.35, low + 0.1, x + wide * 0.7, high - 0.06)
                    self.rect(hole, colour)
            x += wide + 0.06

    def ornament(self) -> None:
        look, wide = self.look, self.look.width_m
        if look.pilasters:
            for bay in range(look.bays + 1):
                x = look.margin_m + bay * look.bay_m
                self.rect((max(0.0, x - 0.16), look.ground_m, min(wide, x + 0.16), look.eaves_m), look.trim)
                self.rect((x + 0.16, look.ground_m, x + 0.21, look.eaves_m), darker(look.wall, 0.75))
        if look.quoins:
            for step in range(int(look.eaves_m / 0.45)):
                long = 0.5 if step % 2 else 0.3
                y = 0.45 * step + 0.02
                for box in ((0.0, y, long, y + 0.41), (wide - long, y, wide, y + 0.41)):
                    self.rect(box, look.trim)
        for storey in range(look.storeys):
            if look.bands == 1 or (look.bands >= 2 and storey == 0):
                y = look.ground_m + storey * look.storey_m
                self.rect((0, y - 0.02, wide, y + (0.24 if look.bands == 3 else 0.14)), look.trim)
                self.rect((0, y - 0.09, wide, y - 0.02), darker(look.wall, 0.72))
        base = look.eaves_m - look.cornice_m
        self.rect((0, base, wide, base + 0.1), darker(look.wall, 0.62))
        self.rect((0, base + 0.1, wide, look.eaves_m), look.trim)
        self.rect((0, look.eaves_m - 0.12, wide, look.eaves_m), darker(look.trim, 1.08))
        if look.style.window in ("sash", "french", "arched"):
            for step in range(int(wide / 0.5)):
                x = 0.12 + 0.5 * step
                self.rect((x, base + 0.1, x + 0.22, base + 0.1 + min(0.3, look.cornice_m / 2)), darker(look.trim, 0.8))
        self.rect((0.02, 0, 0.12, look.eaves_m), darker(look.wall, 0.6))

    def oddities(self) -> None:
        for storey, bay, kind in self.look.oddities:
            left, bottom, right, _ = self.window_box(storey, bay)
            middle = (left + right) / 2
            if kind == 0:
                self.rect((middle - 0.42, bottom - 0.55, middle + 0.42, bottom + 0.05), (206, 206, 202))
                self.rect((middle - 0.3, bottom - 0.47, middle + 0.1, bottom - 0.03), (120, 122, 124))
            elif kind == 1:
                shade = self.look.signs[0][2] if self.look.signs else self.look.door
                self.rect((right + 0.1, bottom - 0.5, right + 0.5, bottom + 1.2), shade)
            elif kind == 2:
                self.rect((left, bottom - 0.28, right, bottom - 0.08), (126, 80, 58))
                self.rect((left - 0.04, bottom - 0.1, right + 0.04, bottom + 0.2), (70, 118, 58))
            else:
                self.rect((left - 0.5, bottom + 0.4, left - 0.2, bottom + 0.75), (228, 226, 220))
