"""The images that look most like an anchor and show another building.

Dropped from what the search finds are images of the anchor's own building, itself included, and of buildings nearer
to it on the ground than a minimum distance: a building id stands for a point of a facade, and two points a few metres
apart may be one physical building, which must not become a negative of itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from spatial_core.geo.sphere import EARTH_RADIUS_M, haversine_m
from spatial_core.street_view.fingerprint_files import Images

MARGIN = 50  # candidates beyond the neighbours wanted, for those that are dropped
_BLOCK_CANDIDATES = 2 << 20  # a block's arrays take about 60 bytes a candidate
_EXACT_PAIRS = 1 << 16

Int64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]


class Search(Protocol):
    """What `ExactSearch` and `ApproximateSearch` have in common."""

    def search(self, queries: npt.NDArray[np.floating], k: int) -> tuple[npt.NDArray[np.float32], Int64]: ...


@dataclass(frozen=True)
class Neighbours:
    """Neighbour lists of A anchors, one after another, each nearest first.

    Args:
        offsets: (A + 1,) int64.
        rows: (E,) int64, images.
        distances: (E,) visual distances.
        excluded: (A,) images missing from each list for standing too near on the ground.
    """

    offsets: Int64
    rows: Int64
    distances: Floats
    excluded: Int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def part(self, first: int, last: int) -> Neighbours:
        """The lists of anchors `first` to `last`."""
        entries = slice(self.offsets[first], self.offsets[last])
        offsets = self.offsets[first : last + 1] - self.offsets[first]
        return Neighbours(offsets, self.rows[entries], self.distances[entries], self.excluded[first:last])

    def pick(self, anchors: Int64) -> Neighbours:
        """The lists of some anchors, in that order."""
        counts = np.diff(self.offsets)[anchors]
        offsets = _offsets(counts)
        entries = np.repeat(self.offsets[anchors] - offsets[:-1], counts) + np.arange(offsets[-1])
        return Neighbours(offsets, self.rows[entries], self.distances[entries], self.excluded[anchors])


def joined(parts: Sequence[Neighbours]) -> Neighbours:
    """Lists of consecutive anchors as one."""
    return Neighbours(
        _offsets(np.concatenate([np.diff(part.offsets) for part in parts])),
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.distances for part in parts]),
        np.concatenate([part.excluded for part in parts]),
    )


class NeighbourFinder:
    """Neighbours of any anchors among all images.

    Args:
        search: over `scores`.
        scores: (N, C) float32, images in the visual space.
        images: buildings and places of the N images.
        neighbors: neighbours wanted.
        min_distance_m: ground distance below which two buildings are never each other's neighbours; 0 = off.
        dtype: type of the distances; float64 computes them anew from the scores.
        block: anchors searched at once, at most.
    """

    def __init__(
        self,
        search: Search,
        scores: npt.NDArray[np.float32],
        images: Images,
        *,
        neighbors: int,
        min_distance_m: float,
        dtype: str = "float32",
        block: int = 1 << 62,
    ) -> None:
        self._search = search
        self._scores = scores
        self._images = images
        self._neighbors = neighbors
        self._min_distance_m = min_distance_m
        self._dtype = np.dtype(dtype)
        self._block = block

    def find(self, anchors: Int64) -> Neighbours:
        """Up to `neighbors` neighbours of each of A anchors.

        As many candidates are searched as the earlier pipeline did, `neighbors` + 50, so that without a minimum
        distance an anchor whose building has more than 50 images may end with fewer neighbours, as it did there. With
        one, anchors that come out short are searched again twice as far, until they have enough or all images were
        seen. Either way an anchor has fewer neighbours only when there are no more, or none at all when every other
        image shows its own building or stands too near it.
        """
        return self._find(anchors, min(len(self._images), self._neighbors + MARGIN))

    def _find(self, anchors: Int64, k: int) -> Neighbours:
        step = max(1, min(self._block, _BLOCK_CANDIDATES // k))
        parts = [self._find_block(anchors[start : start + step], k) for start in range(0, len(anchors), step)]
        return joined(parts) if parts else self._find_block(anchors, k)

    def _find_block(self, anchors: Int64, k: int) -> Neighbours:
        distances, rows = self._search.search(self._scores[anchors], k)
        own = self._images.building[anchors]
        buildings = self._images.building[rows]  # a missing row, -1, reads the last image and is masked
        other = (rows >= 0) & (buildings != own[:, None])
        near = self._near(own, buildings, other) if self._min_distance_m > 0 else np.zeros_like(other)
        kept = other & ~near
        kept &= np.cumsum(kept, axis=1) <= self._neighbors
        would_be = other & (np.cumsum(other, axis=1) <= self._neighbors)
        counts = kept.sum(axis=1)
        anchor, column = np.nonzero(kept)
        found = rows[anchor, column]
        measured = distances[anchor, column].astype(self._dtype)
        if self._dtype == np.float64:
            measured = self._exact(anchors[anchor], found)
        lists = Neighbours(_offsets(counts), found, measured, (would_be & near).sum(axis=1))
        if self._min_distance_m > 0 and k < len(self._images):
            short = np.flatnonzero(counts < self._neighbors)
            if len(short):
                further = self._find(anchors[short], min(len(self._images), 2 * k))
                return _replaced(lists, short, further)
        return lists

    def _near(
        self, own: npt.NDArray[np.int32], buildings: npt.NDArray[np.int32], other: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """(A, K) whether a candidate's building stands nearer than the minimum to the anchor's."""
        lat, lon = self._images.lat, self._images.lon
        # Two points are at least as far apart as their parallels, which is cheap to rule most pairs out by.
        reach = np.degrees(self._min_distance_m / EARTH_RADIUS_M) * (1 + 1e-9)
        near: npt.NDArray[np.bool_] = other & (np.abs(lat[buildings] - lat[own][:, None]) <= reach)
        anchor, column = np.nonzero(near)
        a, b = own[anchor], buildings[anchor, column]
        near[anchor, column] = haversine_m(lat[a], lon[a], lat[b], lon[b]) < self._min_distance_m
        return near

    def _exact(self, anchors: Int64, rows: Int64) -> Floats:
        distances = np.empty(len(rows))
        for start in range(0, len(rows), _EXACT_PAIRS):
            part = slice(start, start + _EXACT_PAIRS)
            difference = self._scores[anchors[part]].astype(np.float64) - self._scores[rows[part]]
            distances[part] = np.sqrt(np.einsum("ec,ec->e", difference, difference))
        return distances


def _replaced(lists: Neighbours, anchors: Int64, others: Neighbours) -> Neighbours:
    """`lists` with those of `anchors` (ascending) replaced by `others`."""
    counts = np.diff(lists.offsets)
    replaced = np.zeros(len(counts), dtype=bool)
    replaced[anchors] = True
    stays = np.repeat(~replaced, counts)
    counts[anchors] = np.diff(others.offsets)
    mine = np.repeat(~replaced, counts)
    rows, distances = np.empty(len(mine), np.int64), np.empty(len(mine), lists.distances.dtype)
    rows[mine], rows[~mine] = lists.rows[stays], others.rows
    distances[mine], distances[~mine] = lists.distances[stays], others.distances
    excluded = lists.excluded.copy()
    excluded[anchors] = others.excluded
    return Neighbours(_offsets(counts), rows, distances, excluded)


def _offsets(counts: npt.NDArray[np.integer]) -> Int64:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
