"""One split in memory: features as one matrix, and the few columns that the report breaks results down by.

Features are read batch by batch into a matrix of the stored type, so a split takes rows x width x 2 or 4 bytes plus
about 100 bytes an image, and one batch on top. Never more than one split is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from spatial_core.errors import ArtifactError
from spatial_core.storage.parquet import open_parquet, stream_batches, vectors_to_numpy

REQUIRED = ("dataset_id", "building_id", "streetview_image_id", "embedding")
_POSITION = ("target_lat", "target_lon", "street_view_lat", "street_view_lon")
_BATCH_BYTES = 64 << 20
_UNKNOWN_WIDTH = 4096  # of lists without a fixed size: as wide as the widest backbone
_METERS_A_DEGREE = 111_320.0


@dataclass(frozen=True)
class SplitData:
    """Images of one split, N of them.

    Args:
        name: train, val or test.
        features: (N, D) backbone features as stored, float32 or float16, not normalised.
        labels: (N,) int64 building number; `buildings[labels[i]]` is the building id of image i.
        buildings: building ids, in order of first appearance.
        images: (N,) image ids.
        datasets: (N,) data set (tar) numbers.
        camera: (N, 2) camera position seen from the facade point, metres east and north; None when not recorded.
        distance_m: (N,) camera to facade point; None when not recorded.
    """

    name: str
    features: Tensor
    labels: Tensor
    buildings: pa.Array
    images: pa.Array
    datasets: npt.NDArray[np.int64]
    camera: npt.NDArray[np.float64] | None
    distance_m: npt.NDArray[np.float64] | None

    def __len__(self) -> int:
        return len(self.labels)


def feature_width(path: Path) -> int:
    """Width of the `embedding` column of a split; 0 when the file has no rows and does not fix it."""
    file = open_parquet(path, required=REQUIRED)
    kind = file.schema_arrow.field("embedding").type
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    return next((batch.shape[1] for batch in feature_batches(path) if len(batch)), 0)


def feature_batches(path: Path) -> Iterator[npt.NDArray[np.float32] | npt.NDArray[np.float16]]:
    """The features of a split, one (rows, D) batch of bounded size after another.

    Raises:
        ArtifactError: if a page is damaged, or a vector is null or of another length.
    """
    for batch in _batches(path, ["embedding"]):
        yield _matrix(path, batch.column("embedding"))


def read_split(path: Path, name: str) -> SplitData:
    """Read a split whole.

    Raises:
        InputError: if the file is missing, not parquet, or lacks a required column.
        ArtifactError: if it is damaged or holds vectors of different lengths.
    """
    file = open_parquet(path, required=REQUIRED)
    known = set(file.schema_arrow.names)
    scalars = [*REQUIRED[:3], *(column for column in (*_POSITION, "distance_m") if column in known)]
    rows, width = file.metadata.num_rows, feature_width(path)
    features, filled = None, 0
    pieces: list[pa.RecordBatch] = []
    for batch in _batches(path, [*scalars, "embedding"]):
        block = torch.from_numpy(_matrix(path, batch.column("embedding")))
        if features is None:
            features = torch.empty(rows, width, dtype=block.dtype)
        if block.shape[1] != width:
            raise ArtifactError(f"{path}: vectors of {width} and of {block.shape[1]} values in one column")
        features[filled : filled + len(block)] = block
        filled += len(block)
        pieces.append(batch.select(scalars))
    table = pa.Table.from_batches(pieces, schema=pa.schema([file.schema_arrow.field(column) for column in scalars]))
    nulls = [column for column in REQUIRED[:3] if table.column(column).null_count]
    if nulls:
        raise ArtifactError(f"{path}: null values in {', '.join(nulls)}; rebuild the splits")
    encoded = table.column("building_id").cast(pa.string()).combine_chunks().dictionary_encode()
    return SplitData(
        name=name,
        features=torch.empty(0, width) if features is None else features,
        labels=torch.from_numpy(encoded.indices.to_numpy().astype(np.int64)),
        buildings=encoded.dictionary,
        images=table.column("streetview_image_id").combine_chunks().cast(pa.string()),
        datasets=table.column("dataset_id").to_numpy().astype(np.int64),
        camera=_camera(table) if known.issuperset(_POSITION) else None,
        distance_m=_numbers(table, "distance_m") if "distance_m" in known else None,
    )


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    kind = open_parquet(path, required=columns).schema_arrow.field("embedding").type
    width = kind.list_size if pa.types.is_fixed_size_list(kind) else _UNKNOWN_WIDTH
    return stream_batches(path, columns, max(1, _BATCH_BYTES // (8 * width)))


def _matrix(path: Path, column: pa.Array) -> npt.NDArray[np.float32] | npt.NDArray[np.float16]:
    try:
        matrix = vectors_to_numpy(column)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if matrix.dtype == np.float16:
        return matrix.copy()
    # The earlier pipeline stored float64; a copy in any case, for Arrow's buffers are read-only.
    return matrix.astype(np.float32)


def _numbers(table: pa.Table, column: str) -> npt.NDArray[np.float64]:
    """A column as float64, nulls as NaN."""
    numbers: npt.NDArray[np.float64] = table.column(column).cast(pa.float64()).to_numpy()
    return numbers


def _camera(table: pa.Table) -> npt.NDArray[np.float64]:
    """(N, 2) metres east and north of the facade point; flat-earth, good to centimetres at street distances."""
    target_lat, target_lon, camera_lat, camera_lon = (_numbers(table, column) for column in _POSITION)
    degrees_east = (camera_lon - target_lon + 180) % 360 - 180
    east = degrees_east * np.cos(np.radians(target_lat)) * _METERS_A_DEGREE
    return np.stack([east, (camera_lat - target_lat) * _METERS_A_DEGREE], axis=1)


def row_count(path: Path) -> int:
    """Rows of a split, from its footer."""
    metadata: pq.FileMetaData = open_parquet(path).metadata
    return int(metadata.num_rows)
