"""Architectural styles: palettes and window grammars. One building drawn from a style is a `Look`."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace
from typing import Literal

RGB = tuple[int, int, int]
Material = Literal["brick", "plaster", "stone", "panel"]
Window = Literal["sash", "french", "square", "ribbon", "arched", "grid"]
Range = tuple[float, float]


@dataclass(frozen=True)
class Style:
    """Grammar of one kind of building.

    Args:
        window_width: share of a bay that is window.
        window_height: share of a storey that is window.
        bay_m, storey_m: width of a bay and height of a storey.
        storeys: fewest and most above the ground floor.
        shop: probability that a ground floor bay is a shop window.
        roof: what stands on the eaves.
        balconies, shutters, bands, quoins, pilasters: probabilities of these ornaments.
    """

    name: str
    material: Material
    window: Window
    walls: tuple[RGB, ...]
    trims: tuple[RGB, ...]
    roofs: tuple[RGB, ...]
    roof: Literal["flat", "mansard", "pitched"]
    window_width: Range
    window_height: Range
    bay_m: Range = (2.4, 3.2)
    storey_m: Range = (3.0, 3.5)
    storeys: tuple[int, int] = (2, 4)
    shop: float = 0.4
    balconies: float = 0.2
    shutters: float = 0.0
    bands: float = 0.5
    quoins: float = 0.2
    pilasters: float = 0.0


_SLATE, _ZINC, _TILE, _TAR = (84, 88, 98), (140, 150, 160), (168, 88, 60), (92, 90, 88)
_WHITE, _CREAM, _STONE = (236, 234, 228), (226, 214, 188), (198, 188, 170)

_STYLES = (
    Style("red brick terrace", "brick", "sash", ((152, 74, 58), (140, 66, 52), (164, 86, 68)), (_WHITE, _CREAM),
          (_SLATE,), "pitched", (0.38, 0.48), (0.52, 0.62), storeys=(1, 3), shop=0.25, bands=0.5),
    Style("limestone apartment house", "stone", "french", ((214, 200, 172), (206, 194, 170), (220, 208, 184)),
          ((232, 224, 206), (190, 178, 156)), (_ZINC, (120, 130, 142)), "mansard", (0.36, 0.44), (0.66, 0.74),
          storey_m=(3.2, 3.6), storeys=(3, 5), balconies=0.55, shop=0.6, bands=0.9),
    Style("ochre plaster house", "plaster", "square", ((216, 164, 92), (204, 150, 84), (222, 176, 110)),
          ((240, 226, 196), (214, 196, 166)), (_TILE,), "pitched", (0.32, 0.4), (0.44, 0.54), storeys=(1, 3),
          shutters=0.9, shop=0.35, balconies=0.25),
    Style("pastel plaster house", "plaster", "sash", ((222, 176, 172), (172, 198, 212), (190, 212, 178)),
          (_WHITE,), (_SLATE, _TILE), "pitched", (0.36, 0.46), (0.5, 0.6), storeys=(1, 3), shop=0.5, quoins=0.4),
    Style("white slab block", "panel", "ribbon", ((224, 224, 220), (214, 214, 208), (230, 228, 220)),
          ((120, 124, 128), (70, 76, 84)), (_TAR,), "flat", (0.86, 0.94), (0.42, 0.52), bay_m=(2.8, 3.6),
          storeys=(3, 5), balconies=0.3, bands=0.1, quoins=0.0),
    Style("concrete frame block", "panel", "grid", ((150, 146, 140), (138, 136, 132), (160, 154, 146)),
          ((108, 106, 104), (172, 168, 160)), (_TAR,), "flat", (0.66, 0.76), (0.6, 0.7), bay_m=(2.6, 3.4),
          storeys=(3, 5), bands=0.1, quoins=0.0, pilasters=0.8),
    Style("yellow brick tenement", "brick", "sash", ((198, 172, 116), (188, 160, 104), (206, 182, 130)),
          ((150, 84, 66), _CREAM), (_SLATE,), "flat", (0.4, 0.5), (0.54, 0.64), storeys=(2, 4), shop=0.6, bands=0.9),
    Style("dark glass office", "panel", "grid", ((72, 82, 92), (62, 72, 84), (84, 92, 100)),
          ((44, 50, 58), (150, 158, 166)), (_TAR,), "flat", (0.84, 0.92), (0.78, 0.86), bay_m=(2.2, 3.0),
          storeys=(3, 5), balconies=0.0, bands=0.2, quoins=0.0, shop=0.7),
    Style("brown warehouse", "brick", "arched", ((108, 76, 58), (98, 68, 52), (118, 86, 66)),
          ((150, 112, 84), (70, 74, 70)), (_TAR, _SLATE), "flat", (0.54, 0.66), (0.6, 0.7), bay_m=(3.0, 3.8),
          storey_m=(3.4, 4.0), storeys=(2, 3), shop=0.3, balconies=0.05, pilasters=0.7),
    Style("green deco house", "plaster", "square", ((168, 188, 166), (156, 178, 160), (182, 198, 176)),
          ((234, 224, 190), (60, 92, 88)), (_TAR,), "flat", (0.44, 0.56), (0.42, 0.5), storeys=(2, 4),
          bands=0.9, pilasters=0.4, balconies=0.35),
    Style("grey granite house", "stone", "sash", ((150, 150, 154), (140, 142, 148), (160, 158, 158)),
          (_STONE, (208, 206, 202)), (_SLATE,), "mansard", (0.36, 0.44), (0.52, 0.62), storeys=(2, 4), quoins=0.9,
          bands=0.6),
    Style("terracotta plaster house", "plaster", "french", ((190, 104, 78), (178, 94, 72), (200, 118, 90)),
          ((238, 222, 196), (222, 200, 170)), (_TILE,), "pitched", (0.34, 0.42), (0.62, 0.7), storeys=(2, 3),
          shutters=0.5, balconies=0.4, quoins=0.3),
)  # fmt: skip


def style_table(count: int) -> tuple[Style, ...]:
    """`count` styles; beyond the dozen described here they repeat with the walls in other hues."""
    table = []
    for number in range(count):
        style, turn = _STYLES[number % len(_STYLES)], number // len(_STYLES)
        if turn:
            walls = tuple(_turned(colour, 0.23 * turn) for colour in style.walls)
            style = replace(style, name=f"{style.name} {turn + 1}", walls=walls)
        table.append(style)
    return tuple(table)


def _turned(colour: RGB, turn: float) -> RGB:
    hue, light, saturation = colorsys.rgb_to_hls(*(value / 255 for value in colour))
    r, g, b = (round(255 * value) for value in colorsys.hls_to_rgb((hue + turn) % 1.0, light, max(saturation, 0.25)))
    return r, g, b
