"""Finished pieces of an unfinished embeddings file, so that a killed run loses one piece at most."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spatial_core.errors import ArtifactError, InputError
from spatial_core.storage.parquet import parquet_sink, read_columns, vector_type, vectors_to_arrow

_COLUMN = "embedding"


@dataclass(frozen=True)
class Pieces:
    """The pieces of one artifact under one request.

    Args:
        artifact: the file they will become.
        request: digest of everything that decides the content of a piece, its rows included.
        rows: rows a piece.
        total: rows in all.
        dim: vector length.
        dtype: float32 or float16.
    """

    artifact: Path
    request: str
    rows: int
    total: int
    dim: int
    dtype: str

    @property
    def count(self) -> int:
        """Number of pieces, the last of which may be short."""
        return -(-self.total // self.rows)

    @property
    def folder(self) -> Path:
        """Dotted, so that readers of the folder of artifacts pass over it."""
        return self.artifact.parent / f"{_prefix(self.artifact)}{self.request[:16]}"

    def length(self, index: int) -> int:
        """Rows of piece `index`."""
        return min(self.rows, self.total - index * self.rows)

    def missing(self) -> list[int]:
        """Pieces that are not there, or not whole; a damaged one is removed."""
        return [index for index in range(self.count) if not self._is_whole(index)]

    def write(self, index: int, vectors: npt.NDArray[Any]) -> None:
        """Publish a piece, atomically: (length, dim) of `dtype`."""
        schema = pa.schema([pa.field(_COLUMN, vector_type(self.dim, self.dtype), nullable=False)])
        with parquet_sink(self._path(index), schema) as writer:
            writer.write_table(pa.Table.from_arrays([vectors_to_arrow(vectors)], schema=schema))

    def read(self, index: int) -> pa.ChunkedArray:
        """The vectors of a finished piece.

        Raises:
            InputError, ArtifactError: if it is missing, damaged or of another shape.
        """
        path = self._path(index)
        column = read_columns(path, [_COLUMN]).column(_COLUMN)
        if len(column) != self.length(index) or column.type != vector_type(self.dim, self.dtype):
            raise ArtifactError(
                f"{path}: {len(column)} rows of {column.type}, expected {self.length(index)} of "
                f"{vector_type(self.dim, self.dtype)}; delete it"
            )
        return column

    def sweep(self, *, others_only: bool) -> None:
        """Remove pieces of other requests for this artifact, or all of them."""
        for folder in self.artifact.parent.iterdir():
            if folder.name.startswith(_prefix(self.artifact)) and not (others_only and folder == self.folder):
                shutil.rmtree(folder)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.parquet"

    def _is_whole(self, index: int) -> bool:
        try:
            self.read(index)
        except (InputError, ArtifactError):
            self._path(index).unlink(missing_ok=True)
            return False
        return True


def _prefix(artifact: Path) -> str:
    return f".{artifact.stem}.pieces-"


def stored(vectors: npt.NDArray[np.float32], dtype: str, first_row: int, where: str) -> npt.NDArray[Any]:
    """Vectors as they are stored.

    Raises:
        ArtifactError: if a value is not a finite number, or has none in float16; names the row.
    """
    with np.errstate(over="ignore"):
        narrowed = vectors.astype(dtype, copy=False)
    finite = np.isfinite(narrowed).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        narrow = np.isfinite(vectors[row]).all()
        cause = "does not fit in float16; set embedding_model.vector_dtype to float32" if narrow else "is not finite"
        raise ArtifactError(f"{where}: row {first_row + row}: the model's vector {cause}")
    return narrowed
