"""The plan of the demo city: districts, streets, buildings, the drives of the camera car, and which picture sees what.

One district is one tar. A district depends on the seed and its own number only, so asking for more tars leaves the
first ones as they were. Buildings stand wall to wall along both sides of straight streets; the car drives each street
again and again, in different seasons and light, and one panorama serves every facade point in its reach, as in the real
data set.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from spatial_core.config.sections import DemoSection
from spatial_core.demo.camera import Plane, Vector
from spatial_core.demo.light import Light, draw_light
from spatial_core.demo.looks import Look, draw_look
from spatial_core.demo.styles import Style, style_table

FIRST_DATASET = 901
UNSEEN_DISTRICT = -1
DRIVES = 6
CAMERA_HEIGHT_M = 2.5
_DISTRICT_PITCH_M = 520.0
_STREET_PITCH_M = 90.0
_STREET_LENGTH_M = 250.0
_CROSSING_M = 15.0
_PANORAMA_PITCH_M = 8.0
_GRID_TURN_DEG = 17.0
_STEEPEST_DEG = 54.0
_TWO_POINTS = 0.06


def stream(seed: int, *key: int) -> np.random.Generator:
    """An independent random stream for every key under one seed."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=tuple(part + 2 for part in key)))


@dataclass(frozen=True)
class Building:
    """A house: its side of the street (+1 left of the driving direction, -1 right), place along it, and look."""

    number: int
    side: int
    start_m: float
    look: Look


@dataclass(frozen=True)
class Panorama:
    """One stop of the camera car; `across_m` is left of the street's middle."""

    street_view_id: int
    drive: int
    along_m: float
    across_m: float
    height_m: float


@dataclass(frozen=True)
class Tree:
    along_m: float
    across_m: float
    height_m: float
    kind: int


@dataclass(frozen=True)
class Street:
    """A straight street and all that stands along it.

    Args:
        origin: start of its middle line, metres.
        turn_deg: direction, counterclockwise from east.
        width_m: between the facades on both sides.
        lights: light of each drive.
    """

    number: int
    origin: tuple[float, float]
    turn_deg: float
    width_m: float
    buildings: tuple[Building, ...]
    panoramas: tuple[Panorama, ...]
    trees: tuple[Tree, ...]
    lamps: tuple[tuple[float, float], ...]
    lights: tuple[Light, ...]

    def place(self, along_m: float, across_m: float, up_m: float = 0.0) -> Vector:
        """World position of a point given along and left of the middle line."""
        cos, sin = math.cos(math.radians(self.turn_deg)), math.sin(math.radians(self.turn_deg))
        return (
            self.origin[0] + along_m * cos - across_m * sin,
            self.origin[1] + along_m * sin + across_m * cos,
            up_m,
        )

    def direction(self, along: float, across: float, up: float = 0.0) -> Vector:
        """World direction of a direction given along, left of, and above the street."""
        cos, sin = math.cos(math.radians(self.turn_deg)), math.sin(math.radians(self.turn_deg))
        return (along * cos - across * sin, along * sin + across * cos, up)

    def normal(self, side: int) -> Vector:
        """Outward normal of the facades on a side."""
        return self.direction(0.0, -float(side))

    def facade(self, building: Building) -> Plane:
        """The building's front, from the pavement to its eaves."""
        look, side = building.look, building.side
        along = building.start_m if side > 0 else building.start_m + look.width_m
        corner = self.place(along, side * self.width_m / 2, look.eaves_m)
        return Plane(corner, self.direction(float(side), 0.0), (0.0, 0.0, -1.0), look.width_m, look.eaves_m)


@dataclass(frozen=True)
class Target:
    """A point on a facade: what the data set calls a target.

    Args:
        views: panoramas whose pictures of it are in the tar.
        spare: panoramas that see it too and are not in the tar.
    """

    target_id: int
    street: int
    building: int
    point: Vector
    normal: Vector
    views: tuple[int, ...]
    spare: tuple[int, ...]


@dataclass(frozen=True)
class District:
    """All streets and targets of one tar; buildings and panoramas are numbered within their street."""

    number: int
    dataset_id: int
    streets: tuple[Street, ...]
    targets: tuple[Target, ...]


@lru_cache(maxsize=8)
def plan_district(seed: int, demo: DemoSection, number: int, targets: int) -> District:
    """The district with `number` (`UNSEEN_DISTRICT` for buildings that are in no tar), with that many targets."""
    rng = stream(seed, number, 0)
    styles = style_table(demo.styles)
    common = [styles[i] for i in rng.permutation(len(styles))[: max(3, len(styles) // 2)]]
    column, row = (number % 3, number // 3) if number >= 0 else (-1, 0)
    corner = (column * _DISTRICT_PITCH_M, row * _DISTRICT_PITCH_M)
    seasons = tuple(int(season) for season in rng.permutation(4))
    streets: list[Street] = []
    found: list[Target] = []
    while len(found) < targets:
        street = _plan_street((seed, number, len(streets)), corner, common, seasons)
        found.extend(_targets(stream(seed, number, 3, street.number), street, demo, len(found), targets - len(found)))
        streets.append(street)
    return District(number, FIRST_DATASET + number, tuple(streets), tuple(found))


def _plan_street(
    key: tuple[int, int, int], corner: tuple[float, float], styles: list[Style], seasons: tuple[int, ...]
) -> Street:
    """The street with `key` = (seed, district, number within it)."""
    seed, district, number = key
    rng = stream(seed, district, 1, number)
    turn = math.radians(_GRID_TURN_DEG)
    aside = number * _STREET_PITCH_M
    origin = (corner[0] - aside * math.sin(turn), corner[1] + aside * math.cos(turn))
    width = float(rng.uniform(19, 30))
    buildings: list[Building] = []
    for side in (1, -1):
        along, style = 0.0, styles[int(rng.integers(len(styles)))]
        crossing = float(rng.uniform(60, 120))
        while along < _STREET_LENGTH_M:
            if along > crossing:
                along, crossing = along + _CROSSING_M, along + float(rng.uniform(80, 140))
            if rng.random() > 0.6:
                style = styles[int(rng.integers(len(styles)))]
            look = draw_look(style, stream(seed, district, 2, number, len(buildings)))
            buildings.append(Building(len(buildings), side, round(along, 3), look))
            along += look.width_m + (3.0 if rng.random() < 0.12 else 0.0)
    kerb = width / 2 - 2.8
    shade = float(rng.uniform(0.0, 0.55))
    slots = [(float(x), side) for side in (1, -1) for x in np.arange(4.0, _STREET_LENGTH_M, 11.0)]
    trees = tuple(
        Tree(x + float(rng.uniform(-2, 2)), side * kerb, float(rng.uniform(4.5, 8.5)), int(rng.integers(6)))
        for x, side in slots
        if rng.random() < shade
    )
    lamps = tuple((x + 5.0, side * (kerb + 0.3)) for x, side in slots[::2])
    return Street(
        number=number,
        origin=origin,
        turn_deg=_GRID_TURN_DEG,
        width_m=width,
        buildings=tuple(buildings),
        panoramas=_drive(rng, number),
        trees=trees,
        lamps=lamps,
        lights=tuple(draw_light(seasons[drive % 4], rng) for drive in range(DRIVES)),
    )


def _drive(rng: np.random.Generator, street: int) -> tuple[Panorama, ...]:
    """Stops of every drive through one street, each on one of the two lanes."""
    stops: list[Panorama] = []
    for drive in range(DRIVES):
        lane = 1.7 if rng.random() < 0.5 else -1.7
        along = float(rng.uniform(-20, -12))
        while along < _STREET_LENGTH_M + 30:
            ident = 10_000 + 1_000 * street + len(stops)
            across, height = lane + float(rng.normal(0, 0.25)), CAMERA_HEIGHT_M + float(rng.normal(0, 0.05))
            stops.append(Panorama(ident, drive, along, across, height))
            along += _PANORAMA_PITCH_M * float(rng.uniform(0.85, 1.15))
    return tuple(stops)


def _targets(rng: np.random.Generator, street: Street, demo: DemoSection, taken: int, wanted: int) -> list[Target]:
    """Facade points of one street's buildings, one a building, for a few buildings two some metres apart."""
    points: list[Target] = []
    for building in street.buildings:
        look, plane = building.look, street.facade(building)
        twice = rng.random() < _TWO_POINTS
        shares = (0.28, 0.72) if twice else (float(rng.uniform(0.42, 0.58)),)
        for share in shares:
            if len(points) == wanted:
                return points
            height = round(min(float(rng.uniform(4.0, 6.5)), look.eaves_m * 0.6), 2)
            point = plane.point(share * look.width_m, look.eaves_m - height)
            along = building.start_m + (share if building.side > 0 else 1 - share) * look.width_m
            reach = [
                index
                for index, stop in enumerate(street.panoramas)
                if abs(stop.along_m - along)
                < math.tan(math.radians(_STEEPEST_DEG)) * (street.width_m / 2 - building.side * stop.across_m)
            ]
            order = _by_turns([reach[i] for i in rng.permutation(len(reach))], street)
            count = min(int(rng.integers(demo.min_views, demo.max_views + 1)), len(order))
            if count < demo.min_views:
                continue
            target_id = 300 + 7 * (taken + len(points))
            points.append(
                Target(
                    target_id=target_id,
                    street=street.number,
                    building=building.number,
                    point=point,
                    normal=street.normal(building.side),
                    views=tuple(sorted(order[:count])),
                    spare=tuple(sorted(order[count:])),
                )
            )
    return points


def _by_turns(stops: list[int], street: Street) -> list[int]:
    """Reorder so that every drive had its turn before any has another one.

    Pictures of one drive share light and traffic; taking them from different drives makes finding a building again a
    matter of the building.
    """
    turns: Counter[int] = Counter()
    keyed = []
    for stop in stops:
        drive = street.panoramas[stop].drive
        keyed.append((turns[drive], stop))
        turns[drive] += 1
    return [stop for _, stop in sorted(keyed, key=lambda pair: pair[0])]
