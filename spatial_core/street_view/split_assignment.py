"""Which split a building belongs to: a keyed hash of the building, or of the grid cell it stands in.

The hash turns a unit (building or cell) and the seed into a number in [0, 1), and the cumulated ratios cut that range
into train, val and test. The decision looks at nothing else, so a building keeps its split when tars are added or
removed, and the ratios hold within sampling error: for n units, about sqrt(ratio * (1 - ratio) / n).

Splitting by cell keeps most neighbours together, not all: two buildings of different cells may face each other across
an edge. About 4 * d / side of the buildings lie within d metres of an edge of their cell, which is 20 % for 25 m and
500 m; where the cell beyond it is of another split, they still leak. `spatial_core.street_view.leakage` measures it,
and a larger `data.block_size_m` lowers it in proportion.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from spatial_core.config.sections import DataSection
from spatial_core.geo.grid import grid_cells
from spatial_core.street_view.building_index import BuildingIndex

SPLITS = ("train", "val", "test")
DROPPED = -1
MIN_IMAGES = 2  # an anchor needs a positive


def hash_fractions(key: str, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """(N,) pairs of int64 -> (N,) numbers in [0, 1), as good as uniform and independent, decided by key and pair alone.

    Two rounds of the splitmix64 finaliser, each keyed with 64 bits of SHA-256(key).
    """
    digest = hashlib.sha256(key.encode()).digest()
    keys = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    mixed = _finalise(first.astype(np.int64).view(np.uint64) ^ keys[0])
    mixed = _finalise(mixed + second.astype(np.int64).view(np.uint64) ^ keys[1])
    # The 53 high bits fill a double exactly, so the result never rounds up to 1.
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _finalise(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # The published constants of splitmix64: https://prng.di.unimi.it/splitmix64.c
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def assign_splits(buildings: BuildingIndex, data: DataSection, seed: int) -> npt.NDArray[np.int8]:
    """Index in `SPLITS` of each building, `DROPPED` for one with a single image. (B,) int8."""
    if data.split_strategy == "building":
        fractions = hash_fractions(f"building {seed}", buildings.dataset, buildings.target)
    else:
        cells = grid_cells(buildings.lat, buildings.lon, data.block_size_m)
        fractions = hash_fractions(f"spatial_block {data.block_size_m!r} {seed}", *cells)
    # The last edge is left out: rounding of the sum must not leave a building above it.
    edges = np.cumsum([data.train_ratio, data.val_ratio])
    edges[edges > 1 - 1e-9] = np.inf
    split = np.searchsorted(edges, fractions, side="right").astype(np.int8)
    split[buildings.images < MIN_IMAGES] = DROPPED
    return split
