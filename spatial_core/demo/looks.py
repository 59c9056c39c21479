"""One building of a style, completely described.

Buildings of one style share material, palette and proportions, so they look alike at a glance; what tells them apart is
what tells real ones apart: number of bays and floors, where the door is, signs, awnings, balconies, trim, a shade.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from spatial_core.demo.styles import RGB, Range, Style

Ground = Literal["wall", "door", "shop", "garage"]
Sign = tuple[int, int, RGB, RGB, int]
Awning = tuple[int, RGB, bool]

_DOORS: tuple[RGB, ...] = ((52, 66, 56), (96, 40, 36), (40, 54, 88), (88, 62, 42), (46, 46, 48), (178, 160, 72))
_SIGNS: tuple[RGB, ...] = (
    (186, 44, 40), (36, 92, 156), (40, 122, 78), (232, 182, 48), (52, 48, 52), (206, 108, 40), (128, 52, 110),
    (228, 228, 222), (44, 140, 148),
)  # fmt: skip
_BASES: tuple[RGB, ...] = (
    (212, 206, 192), (70, 74, 82), (120, 60, 52), (66, 92, 82), (84, 98, 124), (176, 150, 110), (150, 146, 142),
)  # fmt: skip
_SHUTTERS: tuple[RGB, ...] = ((58, 96, 74), (70, 100, 128), (132, 74, 52), (104, 112, 108), (150, 164, 156))


@dataclass(frozen=True)
class Look:
    """One building, completely: what does not change between the pictures of it. Lengths in metres.

    Args:
        base: paint of the ground floor, None where it is as the wall above.
        ground: use of each ground floor bay, left to right.
        signs: (first bay, bays, colour, lettering colour, lettering seed) of shop signs.
        awnings: (bay, colour, striped).
        balcony_bays: (storey, bay) of each balcony, storey 0 just above the ground floor.
        blind: (storey, bay) of bricked-up windows.
        oddities: (storey, bay, kind) of air conditioners, flags, plants and lamps.
        texture_seed: weathering and lettering.
    """

    style: Style
    wall: RGB
    trim: RGB
    base: RGB | None
    door: RGB
    shutter: RGB | None
    roof: RGB
    bays: int
    storeys: int
    bay_m: float
    storey_m: float
    ground_m: float
    margin_m: float
    window_w: float
    window_h: float
    panes: tuple[int, int]
    lintel: int
    bands: int
    quoins: bool
    pilasters: bool
    cornice_m: float
    roof_m: float
    ground: tuple[Ground, ...]
    signs: tuple[Sign, ...]
    awnings: tuple[Awning, ...]
    balcony_bays: tuple[tuple[int, int], ...]
    blind: tuple[tuple[int, int], ...]
    oddities: tuple[tuple[int, int, int], ...]
    texture_seed: int

    @property
    def width_m(self) -> float:
        return self.bays * self.bay_m + 2 * self.margin_m

    @property
    def eaves_m(self) -> float:
        """Height of the flat facade."""
        return self.ground_m + self.storeys * self.storey_m + self.cornice_m


def draw_look(style: Style, rng: np.random.Generator) -> Look:
    """A building of `style`."""

    def between(limits: Range) -> float:
        return round(float(rng.uniform(*limits)), 3)

    def chance(probability: float) -> bool:
        return bool(rng.random() < probability)

    def choose(options: tuple[RGB, ...]) -> RGB:
        return options[int(rng.integers(len(options)))]

    bays = int(rng.integers(3, 6))
    storeys = int(rng.integers(style.storeys[0], style.storeys[1] + 1))
    door_bay = int(rng.integers(bays))
    shops = chance(style.shop)
    ground: list[Ground] = [
        "door" if bay == door_bay else "shop" if shops and chance(0.85) else "garage" if chance(0.08) else "wall"
        for bay in range(bays)
    ]
    signs, awnings = _shopfronts(ground, rng)
    rows = [storey for storey in range(storeys) if chance(style.balconies)]
    pattern = int(rng.integers(3))
    balconies = [
        (storey, bay) for storey in rows for bay in range(bays) if pattern == 0 or (bay + (pattern - 1)) % 2 == 0
    ]
    openings = [(storey, bay) for storey in range(storeys) for bay in range(bays)]
    return Look(
        style=style,
        wall=_shade(choose(style.walls), rng, 14),
        trim=_shade(choose(style.trims), rng, 8),
        base=_shade(choose(_BASES), rng, 14) if chance(0.45) else None,
        door=choose(_DOORS),
        shutter=choose(_SHUTTERS) if chance(style.shutters) else None,
        roof=_shade(choose(style.roofs), rng, 10),
        bays=bays,
        storeys=storeys,
        bay_m=between(style.bay_m),
        storey_m=between(style.storey_m),
        ground_m=between((3.4, 4.3)),
        margin_m=between((0.3, 0.8)),
        window_w=between(style.window_width),
        window_h=between(style.window_height),
        panes=(int(rng.integers(1, 4)), int(rng.integers(1, 4))),
        lintel=int(rng.integers(4)),
        bands=int(rng.integers(1, 4)) if chance(style.bands) else 0,
        quoins=chance(style.quoins),
        pilasters=chance(style.pilasters),
        cornice_m=between((0.35, 1.1)),
        roof_m={"flat": 0.0, "mansard": between((2.0, 2.8)), "pitched": between((1.6, 3.0))}[style.roof],
        ground=tuple(ground),
        signs=signs,
        awnings=awnings,
        balcony_bays=tuple(balconies),
        blind=tuple(spot for spot in openings if chance(0.05)),
        oddities=tuple((*spot, int(rng.integers(4))) for spot in openings if chance(0.12)),
        texture_seed=int(rng.integers(1 << 31)),
    )


def _shopfronts(ground: list[Ground], rng: np.random.Generator) -> tuple[tuple[Sign, ...], tuple[Awning, ...]]:
    """A sign over each run of shop bays, and awnings over some of them."""
    signs: list[Sign] = []
    awnings: list[Awning] = []
    first = 0
    while first < len(ground):
        last = first
        while last < len(ground) and ground[last] == "shop":
            last += 1
        if last > first:
            colour = _SIGNS[int(rng.integers(len(_SIGNS)))]
            lettering = (240, 236, 222) if sum(colour) < 480 else (40, 38, 40)
            signs.append((first, last - first, colour, lettering, int(rng.integers(1 << 31))))
            if rng.random() < 0.4:
                shade = _SIGNS[int(rng.integers(len(_SIGNS)))]
                striped = bool(rng.random() < 0.5)
                awnings.extend((bay, shade, striped) for bay in range(first, last))
        first = last + 1
    return tuple(signs), tuple(awnings)


def _shade(colour: RGB, rng: np.random.Generator, spread: int) -> RGB:
    """A slightly different colour: one common step in brightness, small ones in each channel."""
    common = int(rng.integers(-spread, spread + 1))
    r, g, b = (min(255, max(0, value + common + int(rng.integers(-3, 4)))) for value in colour)
    return r, g, b
