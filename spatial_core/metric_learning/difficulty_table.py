"""The difficulty table as flat arrays: for each image of a split, its neighbour buildings grouped by band.

Memory: 4 bytes a neighbour that is kept and 25 bytes an image, where a Python structure took about 11 KB an image. The
table is read in record batches; no neighbour passes through Python by itself.

Kept are neighbours whose building is in the split, is not the image's own, and is not nearer on the ground than the
minimum distance: facade points a few metres apart may be one physical building.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from spatial_core.errors import ArtifactError
from spatial_core.geo.sphere import EARTH_RADIUS_M
from spatial_core.metric_learning.bandit import BANDS
from spatial_core.storage.parquet import open_parquet, read_columns, stream_batches

_BATCH_ROWS = 8192  # with 150 neighbours an image about 300 MB of intermediate arrays
_COLUMNS = ["target_coord_hash", "neighbor_building_ids", "neighbor_bands"]

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Candidates:
    """Candidate buildings of N images.

    Entries of image i in band b are `building[start[i] + band_offsets[i, b] : start[i] + band_offsets[i, b + 1]]`; a
    building with several near images occurs as often, so it is drawn that much more often.

    Args:
        start: (N,) int64.
        band_offsets: (N, 8) int16, 0 in the first column; all 0 for an image without candidates.
        available: (N,) uint8 bit set of the bands that have entries.
        building: (E,) int32.
    """

    start: Tensor
    band_offsets: Tensor
    available: Tensor
    building: Tensor

    def to(self, device: torch.device) -> Candidates:
        return Candidates(*(part.to(device) for part in vars(self).values()))


@dataclass(frozen=True)
class TableCounts:
    """What became of the table's neighbours.

    Args:
        images: images that can be anchors.
        covered: of those, the ones with at least one candidate.
        neighbours: neighbours listed for them.
        elsewhere: of those, in buildings of other splits.
        own: of those, in the image's own building.
        near: of those, too near on the ground.
        kept: of those, candidates.
    """

    images: int
    covered: int
    neighbours: int
    elsewhere: int
    own: int
    near: int
    kept: int


def chord(first: Tensor, second: Tensor) -> Tensor:
    """Length of the straight line between unit vectors (..., 3), which grows with the ground distance."""
    return (first - second).square().sum(-1).sqrt()


def chord_of(distance_m: float) -> float:
    """The chord of unit vectors whose places are `distance_m` apart on the ground."""
    return 2 * math.sin(min(distance_m / EARTH_RADIUS_M, math.pi) / 2)


def load_candidates(
    path: Path,
    image_ids: pa.Array | pa.ChunkedArray,
    building_ids: pa.Array | pa.ChunkedArray,
    label: Integers,
    wanted: npt.NDArray[np.bool_],
    *,
    positions: Floats | None = None,
    min_distance_m: float = 0.0,
) -> tuple[Candidates, TableCounts]:
    """Read the table for one split.

    Args:
        path: difficulty parquet.
        image_ids: (N,) streetview_image_id of the split's rows.
        building_ids: (B,) building_id by label.
        label: (N,) building of each row.
        wanted: (N,) rows that can be anchors; the neighbours of others are not kept.
        positions: (B, 3) unit vectors of the buildings' places on the globe; when None, no neighbour is too near.
        min_distance_m: neighbours nearer than this on the ground are left out.

    Raises:
        InputError: if the file is missing or lacks a column.
        ArtifactError: if lists are null or of different lengths, a band is outside 0-6, or an image occurs twice.
    """
    file = open_parquet(path, _COLUMNS)
    image_of_line = _images(path, image_ids, wanted)
    start = np.zeros(len(label), dtype=np.int64)
    band_offsets = np.zeros((len(label), BANDS + 1), dtype=np.int16)
    building = np.empty(_listed(file), dtype=np.int32)  # an upper bound; pages beyond what is kept are never touched
    threshold = chord_of(min_distance_m) if positions is not None and min_distance_m > 0 else None
    line = used = elsewhere = own = near = listed = 0
    for batch in stream_batches(path, _COLUMNS[1:], _BATCH_ROWS):
        images = image_of_line[line : line + len(batch)]
        line += len(batch)
        lengths, neighbour, band = _entries(path, batch.filter(pa.array(images >= 0)), building_ids)
        images = images[images >= 0]
        index = np.repeat(np.arange(len(images)), lengths)
        anchor = label[images[index]]
        inside, other = neighbour >= 0, neighbour != anchor
        fit = inside & other
        if positions is not None and threshold is not None:
            fit &= ~_nearer(positions, anchor, neighbour, threshold)
        listed += len(neighbour)
        elsewhere += int((~inside).sum())
        own += int((~other).sum())
        near += int((inside & other & ~fit).sum())
        key, kept = _by_band(index[fit] * BANDS + band[fit], neighbour[fit])
        ends = np.bincount(key, minlength=len(images) * BANDS).reshape(len(images), BANDS).cumsum(axis=1)
        if len(ends) and ends.max() > np.iinfo(np.int16).max:
            raise ArtifactError(f"{path}: {ends.max()} neighbours of one image; at most 32767 are supported")
        start[images] = used + ends[:, -1].cumsum() - ends[:, -1]
        band_offsets[images, 1:] = ends
        building[used : used + len(kept)] = kept
        used += len(kept)
    available = np.packbits(np.diff(band_offsets, axis=1) > 0, axis=1, bitorder="little")[:, 0]
    counts = TableCounts(int(wanted.sum()), int((available > 0).sum()), listed, elsewhere, own, near, used)
    arrays = (start, band_offsets, available, building[:used])
    return Candidates(*(torch.from_numpy(array) for array in arrays)), counts


def _images(path: Path, image_ids: pa.Array | pa.ChunkedArray, wanted: npt.NDArray[np.bool_]) -> Integers:
    """Row of the split that each line of the table is about; -1 where it is none that can be an anchor."""
    images = _codes(read_columns(path, _COLUMNS[:1]).column(0), image_ids)
    found = images[images >= 0]
    if repeated := len(found) - len(np.unique(found)):
        raise ArtifactError(f"{path}: {repeated} images occur more than once; rebuild it with stage 'difficulty'")
    return np.where((images >= 0) & wanted[images], images, -1)


def _listed(file: pq.ParquetFile) -> int:
    """Upper bound on the neighbours in a file, from its footer."""
    metadata = file.metadata
    column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path.startswith(_COLUMNS[2]))
    return sum(metadata.row_group(group).column(column).num_values for group in range(metadata.num_row_groups))


def _codes(values: pa.Array | pa.ChunkedArray, known: pa.Array | pa.ChunkedArray) -> Integers:
    """Position of each value in `known`, -1 where it is not there."""
    found = pc.fill_null(pc.index_in(values, value_set=known), -1)
    return np.asarray(found, dtype=np.int64)


def _entries(
    path: Path, batch: pa.RecordBatch, building_ids: pa.Array | pa.ChunkedArray
) -> tuple[Integers, Integers, Integers]:
    """Neighbours of a batch one after another: (rows,) list lengths, (E,) building or -1, (E,) band."""
    neighbours, bands = batch.column(0), batch.column(1)
    names, band = neighbours.flatten(), bands.flatten()
    if neighbours.null_count or bands.null_count or names.null_count or band.null_count:
        raise ArtifactError(f"{path}: null neighbours or bands; rebuild it with stage 'difficulty'")
    lengths = np.asarray(neighbours.value_lengths(), dtype=np.int64)
    if not np.array_equal(lengths, np.asarray(bands.value_lengths())):
        raise ArtifactError(f"{path}: an image has more neighbours than bands, or fewer; rebuild it")
    band = np.asarray(band, dtype=np.int64)
    if len(band) and (band.min() < 0 or band.max() >= BANDS):
        raise ArtifactError(f"{path}: bands from {band.min()} to {band.max()}, expected 0 to {BANDS - 1}; rebuild it")
    encoded = names.dictionary_encode()  # each building occurs many times: look it up once
    codes = _codes(encoded.dictionary, building_ids)
    return lengths, codes[np.asarray(encoded.indices)], band


def _nearer(positions: Floats, first: Integers, second: Integers, threshold: float) -> npt.NDArray[np.bool_]:
    """Whether each pair of buildings is nearer than a chord; -1, a building of another split, may get either answer."""
    apart = positions[first]
    apart -= positions[second]
    near: npt.NDArray[np.bool_] = np.einsum("ij,ij->i", apart, apart) < threshold * threshold
    return near


def _by_band(key: Integers, neighbour: Integers) -> tuple[Integers, Integers]:
    """Entries in the order of their key (image, band)."""
    if not np.any(key[1:] < key[:-1]):  # tables list neighbours nearest first, which is hardest band first
        return key, neighbour
    order = np.argsort(key, kind="stable")
    return key[order], neighbour[order]
