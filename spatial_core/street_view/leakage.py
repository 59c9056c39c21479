"""How many held-out buildings stand next to a training building, where a model may have seen the same facade."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spatial_core.geo.sphere import nearest_m
from spatial_core.street_view.building_index import BuildingIndex
from spatial_core.street_view.split_assignment import SPLITS

DISTANCES_M = (25.0, 50.0)


@dataclass(frozen=True)
class Leakage:
    """Held-out buildings near a training building.

    Args:
        buildings: buildings of the held-out split.
        near: distance in metres -> how many of them have a training building within it.
    """

    buildings: int
    near: dict[float, int]

    def to_json(self) -> dict[str, Any]:
        """Counts and shares, `within_25m` and so on; the share of no buildings is 0."""
        record: dict[str, Any] = {"buildings": self.buildings}
        for distance, count in self.near.items():
            record[f"buildings_within_{distance:g}m"] = count
            record[f"share_within_{distance:g}m"] = count / self.buildings if self.buildings else 0.0
        return record


def measure_leakage(
    buildings: BuildingIndex, split: npt.NDArray[np.int8], distances_m: tuple[float, ...] = DISTANCES_M
) -> dict[str, Leakage]:
    """Exact leakage of val and of test into train, by great-circle distance."""
    train = split == SPLITS.index("train")
    measured = {}
    for name in ("val", "test"):
        held_out = split == SPLITS.index(name)
        metres = nearest_m(
            buildings.lat[held_out],
            buildings.lon[held_out],
            buildings.lat[train],
            buildings.lon[train],
            max(distances_m),
        )
        near = {distance: int(np.count_nonzero(metres <= distance)) for distance in distances_m}
        measured[name] = Leakage(int(np.count_nonzero(held_out)), near)
    return measured
