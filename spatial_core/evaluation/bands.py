"""Can the look-alikes be told apart? Results against the neighbours of each difficulty band.

The difficulty table lists, for every image, buildings that look like it, in bands from 0 (hardest) to 6 (easiest). For
each query and band, the gallery is cut down to the query's own building and its neighbours of that band that lie in
the same split. Two figures follow:

* recall@1 in that small gallery. Bands hold different numbers of images, so it is read beside chance.
* pair accuracy: how often the query's best right answer scores above a look-alike image, over all of them. It does not
  depend on how many there are, so bands compare directly; 0.5 is close to what noise reaches with one right answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from spatial_core.evaluation.pairs import BuildingIndex, Rows, pair_cosines, positive_pairs
from spatial_core.evaluation.results import Bin, Breakdown
from spatial_core.evaluation.scores import Intervals, Queries
from spatial_core.evaluation.spaces import RANDOM
from spatial_core.evaluation.split_data import SplitData
from spatial_core.metric_learning.bandit import BANDS
from spatial_core.metric_learning.difficulty_table import load_candidates
from spatial_core.retrieval.metrics import TIE

RECALL, PAIRS = "by_difficulty_band", "pair_accuracy_by_difficulty_band"
_NAMES = ("hardest", "", "", "", "", "", "easiest")


@dataclass(frozen=True)
class LookAlikes:
    """Neighbour buildings of queries: query position, building number and band, one entry a query and building."""

    query: Rows
    building: Rows
    band: Rows


def read_look_alikes(path: Path, split: SplitData, queries: Tensor) -> LookAlikes:
    """Neighbours of the queries that lie in the split, by band.

    A building that is a neighbour through several of its images keeps its hardest band.

    Raises:
        InputError: if the table is missing or lacks a column.
        ArtifactError: if it is damaged.
    """
    asked = np.zeros(len(split), dtype=np.bool_)
    asked[queries.numpy()] = True
    candidates, _ = load_candidates(path, split.images, split.buildings, split.labels.numpy(), asked)
    start = candidates.start[queries].numpy()
    offsets = candidates.band_offsets[queries].long().numpy()
    counts = offsets[:, 1:] - offsets[:, :-1]
    total = counts.sum(axis=1)
    query = np.repeat(np.arange(len(queries)), total)
    within = np.arange(len(query)) - np.repeat(np.cumsum(total) - total, total)
    building = candidates.building.numpy()[start[query] + within].astype(np.int64)
    band = np.repeat(np.tile(np.arange(BANDS), len(queries)), counts.ravel())
    order = np.lexsort((band, building, query))
    query, building, band = query[order], building[order], band[order]
    hardest = np.ones(len(query), dtype=bool)
    hardest[1:] = (query[1:] != query[:-1]) | (building[1:] != building[:-1])
    return LookAlikes(query[hardest], building[hardest], band[hardest])


def band_breakdowns(
    found: LookAlikes, split: SplitData, spaces: Mapping[str, Tensor], queries: Queries, intervals: Intervals
) -> tuple[Breakdown, Breakdown]:
    """Recall@1 and pair accuracy by band, see the module's text."""
    if not len(found.query):
        note = "the difficulty table lists no neighbour of these queries in this split"
        return Breakdown(RECALL, unknown=len(queries.rows), note=note), Breakdown(PAIRS, note=note)
    entry, image = BuildingIndex.of(split.labels).expand(found.building)
    owner = found.query[entry]
    # A cell is a query and a band in which it has look-alikes.
    cell, member = np.unique(owner * BANDS + found.band[entry], return_inverse=True)
    cell_query, cell_band = np.divmod(cell, BANDS)
    sizes = np.bincount(member)
    beaten = _beaten(owner, image, split, spaces, queries)
    shares = {method: np.bincount(member, weights=below) / sizes for method, below in beaten.items()}
    recall_bins: list[Bin] = []
    pair_bins: list[Bin] = []
    for band in range(BANDS):
        inside = cell_band == band
        if not inside.any():
            continue
        buildings, positives = queries.buildings[cell_query[inside]], queries.positives[cell_query[inside]]
        wins = [share[inside] for share in shares.values()]
        columns = [(share == 1).astype(np.float64) for share in wins] + wins
        estimates = iter(intervals.of(columns, buildings))
        for bins, rivals in ((recall_bins, sizes[inside]), (pair_bins, 1)):
            bins.append(
                Bin(
                    label=f"{band} {_NAMES[band]}".strip(),
                    queries=int(inside.sum()),
                    buildings=len(np.unique(buildings)),
                    scores={method: next(estimates) for method in shares},
                    chance=float((positives / (positives + rivals)).mean()),
                    extra={"band": band, "mean_look_alike_images": round(float(sizes[inside].mean()), 3)},
                )
            )
    without = len(queries.rows) - len(np.unique(cell_query))
    return Breakdown(RECALL, tuple(recall_bins), without), Breakdown(PAIRS, tuple(pair_bins), without)


def _beaten(
    owner: Rows, image: Rows, split: SplitData, spaces: Mapping[str, Tensor], queries: Queries
) -> dict[str, npt.NDArray[np.bool_]]:
    """By method: does the best right answer of query `owner[i]` score above look-alike `image[i]`? Ties are lost."""
    rows = queries.rows.numpy()
    right_owner, right_image = positive_pairs(split.labels, queries.rows)
    beaten = {}
    for method, vectors in spaces.items():
        if method != RANDOM:
            best = np.full(len(rows), -np.inf, dtype=np.float32)
            np.maximum.at(best, right_owner, pair_cosines(vectors, rows[right_owner], right_image))
            beaten[method] = pair_cosines(vectors, rows[owner], image) < best[owner] - TIE
    return beaten
