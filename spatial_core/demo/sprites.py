"""What stands between the camera and the facade: trees, cars, lamps and people, painted once on clear ground."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from spatial_core.demo.facade import darker
from spatial_core.demo.styles import RGB

TREE_KINDS = 6
CAR_KINDS = 8
PERSON_KINDS = 6
_SEED = 52_009
_LEAVES: dict[int, tuple[RGB, ...]] = {
    0: ((118, 158, 78), (134, 172, 92), (150, 178, 110)),
    1: ((58, 104, 50), (70, 118, 58), (86, 132, 70)),
    2: ((176, 120, 44), (192, 142, 56), (150, 92, 48)),
    3: (),
}
_PAINT: tuple[RGB, ...] = (
    (196, 198, 202), (40, 42, 46), (150, 30, 34), (36, 64, 118), (230, 230, 228), (92, 98, 104), (56, 88, 72),
    (188, 164, 120),
)  # fmt: skip
_COATS: tuple[RGB, ...] = ((58, 62, 78), (142, 46, 44), (70, 92, 70), (188, 168, 130), (40, 40, 42), (80, 110, 150))


@cache
def tree(kind: int, season: int) -> Image.Image:
    """RGBA, 3 wide by 4 high; the trunk stands in the middle of the lower edge. Season 3 is bare."""
    rng = np.random.default_rng([_SEED, kind])
    picture = Image.new("RGBA", (288, 384), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    bark = (92, 78, 64, 255)
    fork = float(rng.uniform(0.52, 0.66)) * 384
    draw.line([(144, 384), (144, fork)], fill=bark, width=13)
    tips = []
    for branch in range(7):
        angle = math.radians(-160 + 140 * (branch + float(rng.uniform(0.2, 0.8))) / 7)
        length = float(rng.uniform(90, 150))
        tip = (144 + length * math.cos(angle), fork + length * math.sin(angle))
        draw.line([(144, fork + 10), tip], fill=bark, width=5)
        tips.append(tip)
        for _ in range(5):
            turn = angle + float(rng.uniform(-0.9, 0.9))
            reach = float(rng.uniform(25, 60))
            end = (tip[0] + reach * math.cos(turn), tip[1] + reach * math.sin(turn))
            draw.line([tip, end], fill=bark, width=2)
            tips.append(end)
    shades = _LEAVES[season]
    for step in range(int(rng.integers(110, 190)) if shades else 0):
        x, y = tips[int(rng.integers(len(tips)))]
        x, y = x + float(rng.normal(0, 18)), y + float(rng.normal(0, 16))
        radius = float(rng.uniform(6, 20))
        light = 0.62 + 0.5 * (1 - max(0.0, min(1.0, y / 260))) + 0.1 * (step % 3)
        colour = darker(shades[int(rng.integers(len(shades)))], light)
        draw.ellipse((x - radius, y - radius * 0.8, x + radius, y + radius * 0.8), fill=(*colour, 255))
    return picture


@cache
def car(kind: int) -> tuple[Image.Image, float, float]:
    """RGBA side view of a parked car or van, its length and its height in metres."""
    van = kind % 4 == 3
    length, height = (5.2, 2.2) if van else (4.3, 1.5)
    paint = _PAINT[kind]
    width, high = round(length * 56), round(height * 56)
    picture = Image.new("RGBA", (width, high), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    waist = high * (0.45 if van else 0.48)
    body: list[tuple[float, float]] = [
        (0.0, waist),
        (float(width), waist),
        (float(width), high * 0.86),
        (0.0, high * 0.86),
    ]
    roof = [(0.02, waist), (0.1, 0.0), (0.98, 0.0), (1.0, waist)] if van else [
        (0.14, waist), (0.3, 0.0), (0.7, 0.0), (0.9, waist)
    ]  # fmt: skip
    draw.polygon([(x * width, y) for x, y in roof], fill=(*darker(paint, 0.9), 255))
    panes = [(0.05, 0.16), (0.18, 0.3)] if van else [(0.27, 0.48), (0.51, 0.74)]
    for left, right in panes:
        draw.rectangle((left * width, high * 0.08, right * width, waist - 2), fill=(38, 46, 54, 255))
    draw.polygon(body, fill=(*paint, 255))
    draw.rectangle((0, high * 0.78, width, high * 0.86), fill=(*darker(paint, 0.6), 255))
    for x in (0.18, 0.8):
        radius = high * (0.16 if van else 0.22)
        middle = (x * width, high - radius)
        for size, shade in ((radius, 26), (radius * 0.55, 140)):
            box = (middle[0] - size, middle[1] - size, middle[0] + size, middle[1] + size)
            draw.ellipse(box, fill=(shade, shade, shade + 2, 255))
    draw.rectangle((0, waist + 4, 10, waist + 14), fill=(236, 228, 190, 255))
    draw.rectangle((width - 10, waist + 4, width, waist + 14), fill=(170, 40, 36, 255))
    return picture, length, height


@cache
def person(kind: int) -> Image.Image:
    """RGBA, 1 wide by 3 high."""
    picture = Image.new("RGBA", (60, 180), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    coat = _COATS[kind]
    draw.ellipse((20, 0, 40, 24), fill=(206, 166, 138, 255))
    draw.polygon([(14, 28), (46, 28), (50, 104), (10, 104)], fill=(*coat, 255))
    draw.polygon([(16, 100), (30, 100), (22 - 3 * (kind % 3), 178), (10, 178)], fill=(44, 46, 58, 255))
    draw.polygon([(30, 100), (46, 100), (52, 178), (38 + 3 * (kind % 3), 178)], fill=(38, 40, 50, 255))
    return picture


@cache
def lamp() -> Image.Image:
    """RGBA street lamp, 1 wide by 6 high."""
    picture = Image.new("RGBA", (80, 480), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((36, 20, 44, 480), fill=(66, 70, 72, 255))
    draw.rectangle((30, 430, 50, 480), fill=(58, 62, 64, 255))
    draw.polygon([(40, 18), (76, 10), (78, 22), (40, 30)], fill=(60, 64, 66, 255))
    draw.ellipse((58, 14, 80, 30), fill=(232, 226, 200, 255))
    return picture
