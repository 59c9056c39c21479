"""The data set folder a drop becomes: `state.json`, `parts/rgRRRRR_rbBBBBB.parquet`, `rejects.parquet`.

A part is the unit of resuming. Its footer says which rows of the drop it accounts for and holds the rows it rejected,
so one rename makes vectors and rejections visible together, and nothing else has to agree with it after a crash.
`state.json` and `rejects.parquet` are derived from the parts and only ever describe what lies there.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from spatial_core import schemas
from spatial_core.errors import ArtifactError, InputError, ModelError
from spatial_core.inference.drop import ID_COLUMN, Chunk
from spatial_core.storage.atomic import write_json
from spatial_core.storage.parquet import parquet_sink, read_columns, vectors_to_arrow, vectors_to_numpy
from spatial_core.storage.provenance import FOOTER_KEY, Provenance

STATE = "state.json"
PARTS = "parts"
REJECTS = "rejects.parquet"
UNIT_TOLERANCE = 1e-3
_PART_KEY = b"spatial.part"
_REJECTS_KEY = b"spatial.rejects"


def rejects_schema(id_type: pa.DataType) -> pa.Schema:
    """Rows of a drop that have no vector."""
    return pa.schema(
        [
            schemas.column("row", pa.int64(), "row of the drop, from 0"),
            schemas.column("row_group", pa.int32(), "row group of the drop that holds it"),
            schemas.column(ID_COLUMN, id_type, "identifier as given in the drop", nullable=True),
            schemas.column("reason", pa.string(), "short machine-readable cause"),
            schemas.column("detail", pa.string(), "what was expected and what was found"),
        ]
    )


@dataclass(frozen=True)
class Rejected:
    """One row without a vector, by its place in the chunk."""

    place: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Part:
    """What a part holds.

    Args:
        ids: OSMID of every vector, null where the drop's is null.
        vectors: (N, D) float32, unit length, in row order.
        rejects: table of `rejects_schema`.
        rows_in: rows of its chunk that are accounted for, from the chunk's start: vectors plus rejects.
    """

    ids: pa.ChunkedArray
    vectors: npt.NDArray[np.float32]
    rejects: pa.Table
    rows_in: int


@dataclass(frozen=True)
class PartSummary:
    """The figures of a part, without its rows."""

    rows_in: int
    written: int
    null_ids: int
    rejected: Mapping[str, int]


@dataclass
class Totals:
    """Running figures of a data set."""

    rows_in: int = 0
    written: int = 0
    null_ids: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    def add(self, part: PartSummary, sign: int = 1) -> None:
        self.rows_in += sign * part.rows_in
        self.written += sign * part.written
        self.null_ids += sign * part.null_ids
        for reason, count in part.rejected.items():
            self.rejected[reason] += sign * count


def dataset_folder(output: Path) -> Path:
    """Where the data set of `output` lies: there, or in the sidecar `<output>.parts` when `output` is a file."""
    return output.with_name(f"{output.name}.parts") if output.is_file() else output


def file_names(folder: Path) -> set[str]:
    """Names, relative to a data set, of what belongs to it."""
    return {STATE, REJECTS, *(f"{PARTS}/{part.name}" for part in (folder / PARTS).glob("rg*_rb*.parquet"))}


def discard(folder: Path) -> None:
    """Remove a data set so that it is whole or gone at any moment: `exclusive` sweeps what a killed removal leaves."""
    doomed = folder.with_name(f".{folder.name.lstrip('.')}.discarded.partial")
    folder.replace(doomed)
    shutil.rmtree(doomed)


@dataclass(frozen=True)
class DataSet:
    """A data set folder and what all of its parts share.

    Args:
        root: the folder.
        id_type: Arrow type of OSMID.
        dim: width of the vectors.
        provenance: recorded in every part.
    """

    root: Path
    id_type: pa.DataType
    dim: int
    provenance: Provenance

    def part_path(self, chunk: Chunk) -> Path:
        return self.root / PARTS / chunk.name

    def write_part(self, chunk: Chunk, part: Part) -> PartSummary:
        """Write a part atomically.

        Raises:
            ModelError: if its vectors are not finite and of unit length; nothing is written then.
        """
        if fault := _vector_fault(part.vectors):
            raise ModelError(f"{chunk.name}: the model gave {fault}; nothing was written for these rows")
        rejected = Counter(part.rejects["reason"].to_pylist())
        summary = PartSummary(part.rows_in, len(part.ids), part.ids.null_count, dict(sorted(rejected.items())))
        record = {**asdict(summary), "row_group": chunk.row_group, "batch": chunk.batch, "first_row": chunk.first_row}
        schema = schemas.final_embeddings(self.id_type, self.dim).with_metadata(
            {_PART_KEY: json.dumps(record, sort_keys=True).encode(), _REJECTS_KEY: _to_text(part.rejects)}
        )
        with parquet_sink(self.part_path(chunk), schema, self.provenance) as writer:
            table = pa.Table.from_arrays([part.ids, vectors_to_arrow(part.vectors)], schema=writer.schema)
            writer.write_table(table)
        return summary

    def read_summary(self, chunk: Chunk) -> PartSummary | None:
        """Figures of a chunk's part once every byte of it has been checked; None when it must be made (again)."""
        path = self.part_path(chunk)
        if not path.is_file():
            return None
        try:
            found = self._checked(path, chunk)
        except (InputError, ArtifactError, ValueError, KeyError, TypeError):
            return None
        return found

    def read_part(self, chunk: Chunk) -> Part:
        """A chunk's part in full."""
        path = self.part_path(chunk)
        table = read_columns(path, [ID_COLUMN, "embedding"])
        metadata = pq.read_schema(path).metadata
        rejects = _from_text(metadata[_REJECTS_KEY])
        rows_in = int(json.loads(metadata[_PART_KEY])["rows_in"])
        return Part(table[ID_COLUMN], vectors_to_numpy(table["embedding"]), rejects, rows_in)

    def write_rejects(self, chunks: Sequence[Chunk]) -> None:
        """Gather the rejects of all parts into one file."""
        with parquet_sink(self.root / REJECTS, rejects_schema(self.id_type), self.provenance) as writer:
            for chunk in chunks:
                path = self.part_path(chunk)
                if path.is_file():
                    rejects = _from_text(pq.read_schema(path).metadata[_REJECTS_KEY])
                    writer.write_table(rejects.cast(writer.schema))

    def write_state(self, state: Mapping[str, Any]) -> None:
        write_json(self.root / STATE, dict(state))

    def _checked(self, path: Path, chunk: Chunk) -> PartSummary | None:
        metadata = pq.read_schema(path).metadata or {}
        record = json.loads(metadata[_PART_KEY])
        place = (record["row_group"], record["batch"], record["first_row"])
        origin = Provenance.from_json(metadata[FOOTER_KEY])
        # Settings that have no part in the vectors may have changed since.
        same = replace(origin, config_digest="") == replace(self.provenance, config_digest="")
        if place != (chunk.row_group, chunk.batch, chunk.first_row) or not same:
            return None
        summary = PartSummary(record["rows_in"], record["written"], record["null_ids"], record["rejected"])
        part = self.read_part(chunk)
        whole = len(part.ids) == summary.written and len(part.rejects) == sum(summary.rejected.values())
        accounted = summary.rows_in == summary.written + len(part.rejects)
        return summary if whole and accounted and not _vector_fault(part.vectors) else None


def read_state(root: Path) -> dict[str, Any] | None:
    """The state of a data set, or None where nothing has been started.

    Raises:
        ArtifactError: if it is not readable.
    """
    try:
        state = json.loads((root / STATE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ArtifactError(f"{root / STATE}: not valid JSON ({error}); delete {root} and run again") from error
    if not isinstance(state, dict):
        raise ArtifactError(f"{root / STATE}: holds {type(state).__name__}, expected an object")
    return state


def rejects_table(
    id_type: pa.DataType, chunk: Chunk, ids: pa.ChunkedArray, rejected: Sequence[Rejected], offset: int = 0
) -> pa.Table:
    """Table of `rejects_schema` from places in `ids`, which start at row `offset` of the chunk."""
    ordered = sorted(rejected, key=lambda item: item.place)
    places = pa.array([item.place for item in ordered], pa.int64())
    rows = [chunk.first_row + offset + item.place for item in ordered]
    return pa.Table.from_arrays(
        [
            pa.array(rows, pa.int64()),
            pa.array([chunk.row_group] * len(ordered), pa.int32()),
            ids.take(places),
            pa.array([item.reason for item in ordered], pa.string()),
            pa.array([item.detail for item in ordered], pa.string()),
        ],
        schema=rejects_schema(id_type),
    )


def _vector_fault(vectors: npt.NDArray[np.float32]) -> str:
    """What is wrong with (N, D) vectors that should be of unit length; empty when nothing is."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) < UNIT_TOLERANCE))  # NaN is bad too
    if not len(bad):
        return ""
    return f"{len(bad)} of {len(vectors)} vectors that are not of unit length (the first has length {norms[bad[0]]:g})"


def _to_text(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return base64.b64encode(sink.getvalue())


def _from_text(text: bytes) -> pa.Table:
    return pa.ipc.open_stream(base64.b64decode(text)).read_all()
