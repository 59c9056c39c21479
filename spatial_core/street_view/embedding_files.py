"""The embeddings files a merge reads: what they have in common, and the refusal to mix what does not belong together.

Files of the earlier pipeline are accepted: list<double> instead of fixed-size vectors, and none of our columns after
the identity. The merged schema then holds what all files have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spatial_core import schemas
from spatial_core.errors import ArtifactError, InputError
from spatial_core.geo.sphere import check_degrees
from spatial_core.storage.parquet import open_parquet, stream_batches, vectors_to_numpy
from spatial_core.storage.provenance import FOOTER_KEY, Provenance
from spatial_core.street_view.building_index import BuildingIndex, index_buildings, require_unique_patches
from spatial_core.street_view.identifiers import ID_COLUMNS, checked_ids

SUFFIX = "_embeddings.parquet"
_KEY_COLUMNS = (*ID_COLUMNS, "target_lat", "target_lon")
_DROPPED_COLUMNS = frozenset({"image_path", "tar_file"})
_KEY_ROWS = 65_536
# How Arrow begins what it says of a fixed-size list that is null: it cannot read one.
_NO_LIST = "Expected all lists to be of size"
# float64 is how the earlier pipeline stored float32 values; it is narrowed back.
_STORED = {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float32"}


@dataclass(frozen=True)
class EmbeddingFile:
    """One open question answered: what a file holds.

    Args:
        path: the file.
        rows: image rows.
        schema: as stored.
        value_type: Arrow type of the vectors' values as stored.
        dim: vector length; 0 while unknown, in a file without rows whose vectors have no fixed size.
        provenance: None for a file of another program.
    """

    path: Path
    rows: int
    schema: pa.Schema
    value_type: pa.DataType
    dim: int
    provenance: Provenance | None

    @property
    def origin(self) -> dict[str, Any]:
        """What must be equal in files whose vectors are to be compared with each other."""
        if self.provenance is None:
            return {"model": "unrecorded"}
        return {"model": dict(self.provenance.model), "preprocessing": self.provenance.preprocessing}


def list_embedding_files(directory: Path) -> list[EmbeddingFile]:
    """All `*_embeddings.parquet` of a folder by name, proved to belong together.

    Raises:
        InputError: if there is none, or one lacks a column.
        ArtifactError: if two differ in model, preprocessing, vector length or type; names both.
    """
    paths = sorted(path for path in directory.glob(f"*{SUFFIX}") if not path.name.startswith("."))
    if not paths:
        raise InputError(f"{directory}: no file named *{SUFFIX}; run the embed stage first")
    files = [describe(path) for path in paths]
    known = [file for file in files if file.dim] or files
    for file in files:
        for what, ours, theirs in (
            ("origin", file.origin, known[0].origin),
            ("vector type", str(file.value_type), str(known[0].value_type)),
            ("vector length", file.dim or known[0].dim, known[0].dim),
        ):
            if ours != theirs:
                raise ArtifactError(
                    f"{known[0].path} and {file.path} cannot be merged: {what} {theirs} in the first, {ours} in the "
                    "second; embed both with the same model and settings"
                )
    return files


def describe(path: Path) -> EmbeddingFile:
    """Read a file's footer and, where its vectors have no fixed size, its first vector.

    Raises:
        InputError: if it is not parquet or lacks a required column.
        ArtifactError: if its embedding column does not hold vectors of floats.
    """
    file = open_parquet(path, required=[*(field.name for field in schemas.IDENTITY), "embedding"], memory_map=False)
    schema = file.schema_arrow
    kind = schema.field("embedding").type
    if not (pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind)) or kind.value_type not in _STORED:
        raise ArtifactError(f"{path}: embedding is {kind}, expected a list of float16, float32 or float64")
    if pa.types.is_fixed_size_list(kind):
        dim = kind.list_size
    else:
        dim = next((first_length(batch, path) for batch in stream_batches(path, ["embedding"], 1)), 0)
    text = (schema.metadata or {}).get(FOOTER_KEY)
    provenance = None if text is None else Provenance.from_json(text)
    return EmbeddingFile(path, file.metadata.num_rows, schema, kind.value_type, dim, provenance)


def first_length(batch: pa.RecordBatch, path: Path) -> int:
    """Length of the first vector of a batch of lists."""
    vector = batch.column(0)[0]
    if not vector.is_valid or not len(vector.values):
        raise ArtifactError(f"{path}: row 0 has no embedding")
    return len(vector.values)


def merged_schema(files: Sequence[EmbeddingFile]) -> pa.Schema:
    """Identity and vector, then our columns, then foreign ones, as far as every file has them with one type."""
    dim = max(file.dim for file in files)
    ours = list(schemas.splits(dim or 1, _STORED[files[0].value_type]))
    required = {*(field.name for field in schemas.IDENTITY), "embedding"}
    known = {field.name for field in ours} | _DROPPED_COLUMNS
    kept = []
    for field in [*ours, *(field for field in files[0].schema if field.name not in known)]:
        if field.name in required:
            kept.append(field)
        elif all(field.name in file.schema.names for file in files):
            stored = [file.schema.field(field.name) for file in files]
            if all(other.type == field.type for other in stored):
                kept.append(field.with_nullable(any(other.nullable for other in stored)))
    return pa.schema(kept)


def index_file(path: Path) -> BuildingIndex:
    """Pass 1 over one file: its ids and coordinates, checked, and its buildings counted.

    Holds 40 bytes a row of this one file while it runs, and about as much again to sort them.

    Raises:
        ArtifactError: on malformed ids, an image that occurs twice, or coordinates off the earth.
    """
    nothing, nowhere = np.empty(0, np.int64), np.empty(0)
    parts: list[tuple[npt.NDArray[Any], ...]] = [(nothing, nothing, nothing, nowhere, nowhere)]
    row = 0
    for batch in stream_batches(path, _KEY_COLUMNS, _KEY_ROWS):
        ids = checked_ids(batch, str(path), row)
        numbers = (ids.column(name).to_numpy() for name in ("dataset_id", "target_id", "patch_id"))
        parts.append((*numbers, *coordinates(batch, str(path), row)))
        row += len(batch)
    dataset, target, patch, lat, lon = (np.concatenate(column) for column in zip(*parts, strict=True))
    require_unique_patches(dataset, patch, str(path))
    return index_buildings(dataset, target, patch, lat, lon)


def coordinates(batch: pa.RecordBatch, where: str, first_row: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """target_lat and target_lon of a batch, (N,) float64 degrees each.

    Raises:
        ArtifactError: naming the first row that has none or whose point is not on earth.
    """
    lat, lon = (
        batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False) for name in ("target_lat", "target_lon")
    )
    wrong = check_degrees(lat, lon)
    if len(wrong):
        at = wrong[0]
        raise ArtifactError(
            f"{where}: row {first_row + at} has target_lat {lat[at]}, target_lon {lon[at]}: not degrees on earth"
        )
    return lat, lon


def require_patches_in_one_file(files: Sequence[EmbeddingFile], indices: Sequence[BuildingIndex]) -> None:
    """Refuse an image that occurs in two files. Rereads the ids only of data sets that several files share.

    Raises:
        ArtifactError: naming the files that share the data set, and the image.
    """
    holders: dict[int, list[Path]] = {}
    for file, index in zip(files, indices, strict=True):
        for number in np.unique(index.dataset):
            holders.setdefault(int(number), []).append(file.path)
    for number, paths in holders.items():
        if len(paths) == 1:
            continue
        patches = [
            batch.column("patch_id").cast(pa.int64()).to_numpy()[batch.column("dataset_id").to_numpy() == number]
            for path in paths
            for batch in stream_batches(path, ["dataset_id", "patch_id"], _KEY_ROWS)
        ]
        patch = np.concatenate(patches)
        require_unique_patches(np.full(len(patch), number), patch, " and ".join(str(path) for path in paths))


def vectors(batch: pa.RecordBatch, file: EmbeddingFile, dim: int, first_row: int) -> npt.NDArray[Any]:
    """The embedding column as an (N, dim) matrix of the type it will be stored in, all of a length one can divide by.

    Raises:
        ArtifactError: naming the first row whose vector is missing, not finite, zero, or so long that float32 cannot
            hold the square of its length; or the batch in which one is of another length.
    """
    column = batch.column("embedding")
    if column.null_count:
        missing = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise ArtifactError(f"{file.path}: row {first_row + missing} has no embedding")
    try:
        stored = vectors_to_numpy(column)
    except ArtifactError as error:
        raise ArtifactError(f"{file.path}: rows {first_row} to {first_row + len(batch)}: {error}") from error
    if len(stored) and stored.shape[1] != dim:
        raise ArtifactError(
            f"{file.path}: row {first_row} has a vector of {stored.shape[1]} values, the other files have {dim}"
        )
    with np.errstate(over="ignore"):  # what overflows float32 becomes infinite, and is refused as such
        matrix = stored.astype(_STORED[file.value_type], copy=False).reshape(len(batch), dim)
    wide = matrix.astype(np.float32, copy=False)  # float16 has no room for squares
    with np.errstate(over="ignore", invalid="ignore"):
        squared = np.vecdot(wide, wide)  # NaN and infinity stay what they are, so that one pass tells everything
    sound = (squared > 0) & (squared < np.inf)
    if not sound.all():
        at = int(np.flatnonzero(~sound)[0])
        raise ArtifactError(f"{file.path}: row {first_row + at} has a vector {_fault(wide[at])}")
    return matrix


def _fault(vector: npt.NDArray[np.float32]) -> str:
    """Why a vector has no direction that float32 could tell."""
    if not np.isfinite(vector).all():
        return "with values that are not finite"
    if not vector.any():
        return "of zeros only: it has no direction"
    largest = float(np.abs(vector).max())
    return f"with values up to {largest:.3g}: float32 cannot hold the square of its length"


def batches(file: EmbeddingFile, schema: pa.Schema, rows: int) -> Iterator[pa.RecordBatch]:
    """Pass 2 over one file: the columns of the merged schema.

    Raises:
        ArtifactError: if a page is damaged, or a vector of fixed size is missing; names its row.
    """
    try:
        yield from stream_batches(file.path, schema.names, rows)
    except ArtifactError as error:
        if _NO_LIST not in str(error):
            raise
        raise ArtifactError(f"{file.path}: row {_readable_rows(file.path)} has no embedding") from error


def _readable_rows(path: Path) -> int:
    """How many vectors can be read one by one before one cannot."""
    rows = 0
    try:
        for batch in stream_batches(path, ["embedding"], 1):
            rows += len(batch)
    except ArtifactError:
        return rows
    return rows
