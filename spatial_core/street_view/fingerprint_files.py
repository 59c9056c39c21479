"""The fingerprint files that difficulty is computed from: their ids, buildings and places, and their pixels in batches.

Pixels are streamed. Held for N images of B buildings are the image ids (about 16 bytes an image), the building of each
image (4 bytes) and each building's id and place (about 30 bytes a building): 0.15 GB for 5.8 M images of 1 M buildings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from spatial_core.errors import ArtifactError, InputError
from spatial_core.storage.parquet import open_parquet, stream_batches, vectors_to_numpy
from spatial_core.storage.provenance import FOOTER_KEY, Provenance
from spatial_core.street_view.embedding_files import coordinates
from spatial_core.street_view.identifiers import ID_COLUMNS, TEXT_COLUMNS, checked_ids

SUFFIX = "_fingerprints.parquet"
_BATCH_ROWS = 16_384
_PLACE = ("target_lat", "target_lon")


@dataclass(frozen=True)
class FingerprintSet:
    """All fingerprints of a folder.

    Args:
        paths: files, by name.
        rows: images in all of them.
        dim: values of a fingerprint.
        preprocessing: how the fingerprints were made, as recorded in the files.
    """

    paths: tuple[Path, ...]
    rows: int
    dim: int
    preprocessing: str

    def batches(self) -> Iterator[npt.NDArray[np.uint8]]:
        """The pixels in file order, (n, dim) uint8 a batch.

        Raises:
            ArtifactError: if a fingerprint is missing, of another length, or has a value outside 0 to 255.
        """
        for path in self.paths:
            for batch in stream_batches(path, ["fingerprint"], _BATCH_ROWS):
                yield self._pixels(batch, path)

    def _pixels(self, batch: pa.RecordBatch, path: Path) -> npt.NDArray[np.uint8]:
        try:
            matrix = vectors_to_numpy(batch.column("fingerprint"))
        except ArtifactError as error:
            raise ArtifactError(f"{path}: fingerprint: {error}") from error
        if matrix.shape[1] != self.dim:
            raise ArtifactError(f"{path}: fingerprints of {matrix.shape[1]} values, those before have {self.dim}")
        if matrix.dtype != np.uint8:
            if matrix.min(initial=0) < 0 or matrix.max(initial=0) > 255:
                raise ArtifactError(f"{path}: fingerprint values outside 0 to 255")
            matrix = matrix.astype(np.uint8)
        return matrix


def list_fingerprints(directory: Path) -> FingerprintSet:
    """All `*_fingerprints.parquet` of a folder, proved to belong together.

    Raises:
        InputError: if there is none, none has a row, or one lacks a column.
        ArtifactError: if two were made differently; names both.
    """
    paths = tuple(sorted(path for path in directory.glob(f"*{SUFFIX}") if not path.name.startswith(".")))
    if not paths:
        raise InputError(f"{directory}: no file named *{SUFFIX}; run the fingerprint stage first")
    rows, dim = 0, 0
    origins: dict[str, Path] = {}
    for path in paths:
        file = open_parquet(path, required=[*TEXT_COLUMNS, "fingerprint"], memory_map=False)
        kind = file.schema_arrow.field("fingerprint").type
        lists = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind)
        if not lists or not pa.types.is_integer(kind.value_type):
            raise ArtifactError(f"{path}: fingerprint is {kind}, expected a list of integers")
        if not file.metadata.num_rows:
            continue
        rows += file.metadata.num_rows
        dim = dim or _length(path)
        origins.setdefault(_origin(file.schema_arrow), path)
    if not rows:
        raise InputError(f"{directory}: its fingerprint files have no rows")
    if len(origins) > 1:
        (first, first_path), (second, second_path) = list(origins.items())[:2]
        raise ArtifactError(
            f"{first_path} and {second_path} cannot be compared: made by {first} and by {second}; compute both "
            "fingerprints the same way"
        )
    return FingerprintSet(paths, rows, dim, next(iter(origins)))


def _origin(schema: pa.Schema) -> str:
    """How fingerprints were made, as far as it changes them."""
    text = (schema.metadata or {}).get(FOOTER_KEY)
    if text is None:
        return "an unrecorded program"
    made = Provenance.from_json(text)
    return f"{made.preprocessing} {json.dumps(dict(made.config), sort_keys=True)}".strip()


def _length(path: Path) -> int:
    batch = next(stream_batches(path, ["fingerprint"], 1))
    vector = batch.column(0)[0]
    if not vector.is_valid or not len(vector.values):
        raise ArtifactError(f"{path}: row 0 has no fingerprint")
    return len(vector.values)


@dataclass(frozen=True)
class Images:
    """Who the N images are and where their B buildings stand.

    Args:
        ids: (N,) string, streetview_image_id.
        building: (N,) int32, row in `building_ids`.
        building_ids: (B,) string.
        lat: (B,) degrees, that of the building's first image; NaN where places were not asked for.
        lon: (B,) degrees.
    """

    ids: pa.ChunkedArray
    building: npt.NDArray[np.int32]
    building_ids: pa.StringArray
    lat: npt.NDArray[np.float64]
    lon: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.building)


def read_images(paths: Sequence[Path], *, with_places: bool) -> Images:
    """Read ids, and the coordinates of buildings where asked for, of all files in order.

    Raises:
        InputError: if a file lacks coordinates that are needed.
        ArtifactError: on missing, malformed or repeated image ids, or coordinates off the earth.
    """
    ids: list[pa.Array] = []
    buildings: list[pa.Array] = []
    places: list[npt.NDArray[np.float64]] = []
    for path in paths:
        names = open_parquet(path, required=_PLACE if with_places else ()).schema_arrow.names
        columns = [name for name in (*ID_COLUMNS, *_PLACE) if name in names and (with_places or name not in _PLACE)]
        row = 0
        for batch in stream_batches(path, columns, _BATCH_ROWS):
            checked = checked_ids(batch, str(path), row)
            ids.append(checked.column("streetview_image_id"))
            buildings.append(checked.column("building_id"))
            if with_places:
                places.append(np.stack(coordinates(batch, str(path), row)))
            row += len(batch)
    held = pa.chunked_array(ids, pa.string())
    if pc.count_distinct(held).as_py() < len(held):
        counts = pc.value_counts(held)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        raise ArtifactError(
            f"{paths[0].parent}: streetview_image_id {repeated[0]['values']} occurs {repeated[0]['counts']} times "
            f"in the fingerprint files ({len(repeated)} such ids)"
        )
    encoded = pa.chunked_array(buildings, pa.string()).combine_chunks().dictionary_encode()
    building = encoded.indices.to_numpy()
    lat = lon = np.full(len(encoded.dictionary), np.nan)
    if with_places:
        _, first = np.unique(building, return_index=True)
        lat, lon = np.concatenate(places, axis=1)[:, first]
    return Images(held, building, encoded.dictionary, lat, lon)
