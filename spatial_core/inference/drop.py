"""Reading a drop: one parquet file of new images, chunk by chunk, with memory bounded by a chunk.

Columns: `image_bytes` (JPEG; binary of any width, or the struct of bytes and path that Hugging Face data sets write),
`OSMID` (any scalar type), optional `is_valid`. A chunk is what one part file of the output holds: batch B of row group
R, `read_batch_size` rows, the last of a row group fewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from spatial_core.errors import InputError
from spatial_core.storage.parquet import open_parquet

ID_COLUMN = "OSMID"
IMAGE_COLUMN = "image_bytes"
VALID_COLUMN = "is_valid"


@dataclass(frozen=True)
class Chunk:
    """The rows of one part.

    Args:
        row_group: number of the row group in the file.
        batch: number of the batch in its row group.
        first_row: row of the file the chunk starts at.
        rows: its length.
    """

    row_group: int
    batch: int
    first_row: int
    rows: int

    @property
    def name(self) -> str:
        """File name of the part."""
        return f"rg{self.row_group:05d}_rb{self.batch:05d}.parquet"


@dataclass(frozen=True)
class Drop:
    """What the footer of a drop says.

    Args:
        path: the file.
        id_type: Arrow type of its OSMID column.
        row_groups: rows of each row group.
        has_validity: whether it has an `is_valid` column.
    """

    path: Path
    id_type: pa.DataType
    row_groups: tuple[int, ...]
    has_validity: bool

    @property
    def rows(self) -> int:
        return sum(self.row_groups)

    def chunks(self, read_batch_size: int) -> list[Chunk]:
        """All chunks in file order; a file without rows has one empty chunk, so that its output has a schema."""
        found = []
        first_row = 0
        for row_group, rows in enumerate(self.row_groups):
            for batch, start in enumerate(range(0, rows, read_batch_size)):
                found.append(Chunk(row_group, batch, first_row + start, min(read_batch_size, rows - start)))
            first_row += rows
        return found or [Chunk(0, 0, 0, 0)]


def open_drop(path: Path) -> Drop:
    """Read the footer and check the columns.

    Raises:
        InputError: if the file is not parquet, a column is missing, or of a type that cannot hold what it should.
    """
    file = open_parquet(path, required=(ID_COLUMN, IMAGE_COLUMN))
    schema = file.schema_arrow
    id_type = schema.field(ID_COLUMN).type
    storage = id_type.storage_type if isinstance(id_type, pa.BaseExtensionType) else id_type
    value = storage.value_type if pa.types.is_dictionary(storage) else storage
    if pa.types.is_nested(value):
        raise InputError(
            f"{path}: {ID_COLUMN} is {id_type}; an identifier must be a single value, not a list or struct"
        )
    image_type = schema.field(IMAGE_COLUMN).type
    if not _holds_bytes(image_type):
        raise InputError(f"{path}: {IMAGE_COLUMN} is {image_type}; expected binary (the bytes of a JPEG)")
    has_validity = VALID_COLUMN in schema.names
    if has_validity:
        valid_type = schema.field(VALID_COLUMN).type
        if not (pa.types.is_boolean(valid_type) or pa.types.is_integer(valid_type) or pa.types.is_null(valid_type)):
            raise InputError(f"{path}: {VALID_COLUMN} is {valid_type}; expected bool")
    groups = tuple(file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups))
    return Drop(path, id_type, groups, has_validity)


def read_chunks(drop: Drop, chunks: Sequence[Chunk], read_batch_size: int) -> Iterator[tuple[Chunk, pa.Table]]:
    """Yield the wanted chunks with their columns, in file order. Row groups without a wanted chunk are not read.

    Raises:
        InputError: naming the row group whose data are damaged; chunks before it have been yielded.
    """
    if not drop.rows:
        # Nothing to read, but the output still needs its one empty part.
        yield from ((chunk, open_parquet(drop.path).schema_arrow.empty_table()) for chunk in chunks)
        return
    for row_group, group in groupby(chunks, key=lambda chunk: chunk.row_group):
        wanted = {chunk.batch: chunk for chunk in group}
        last = max(wanted)
        batches = _batches(drop, row_group, read_batch_size)
        for number, table in enumerate(batches):
            if number in wanted:
                if len(table) != wanted[number].rows:
                    raise InputError(f"{drop.path}: row group {row_group} ends early, {wanted[number].name} is short")
                yield wanted[number], table
            if number == last:
                break
        else:
            raise InputError(f"{drop.path}: row group {row_group} holds fewer rows than the footer says")


def _batches(drop: Drop, row_group: int, size: int) -> Iterator[pa.Table]:
    """Tables of exactly `size` rows (the last one fewer): the reader itself may cut at other places."""
    columns = [ID_COLUMN, IMAGE_COLUMN, *([VALID_COLUMN] if drop.has_validity else [])]
    pending: list[pa.RecordBatch] = []
    held = 0
    rows_read = 0
    try:
        file = open_parquet(drop.path, memory_map=False)
        for batch in file.iter_batches(batch_size=size, row_groups=[row_group], columns=columns, use_threads=False):
            rows_read += len(batch)
            pending.append(batch)
            held += len(batch)
            while held >= size:
                table = pa.Table.from_batches(pending)
                yield table.slice(0, size)
                held -= size
                pending = table.slice(size).to_batches() if held else []
    except (pa.ArrowException, OSError) as error:
        start = sum(drop.row_groups[:row_group])
        cause = str(error).splitlines()[0]
        raise InputError(
            f"{drop.path}: row group {row_group} is damaged after row {start + rows_read} ({cause}); parts of rows "
            f"before that are kept, run again with a whole file"
        ) from error
    if held:
        yield pa.Table.from_batches(pending)


def validity(table: pa.Table) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(rows whose `is_valid` is true, rows whose `is_valid` is null)."""
    column = table[VALID_COLUMN].combine_chunks()
    null = column.is_null().to_numpy(zero_copy_only=False)
    valid = pc.fill_null(column.cast(pa.bool_()), False).to_numpy(zero_copy_only=False)
    return valid, null


def image_buffers(table: pa.Table) -> list[memoryview | None]:
    """The bytes of every image without copying them; None where there are none."""
    found: list[memoryview | None] = []
    for chunk in table[IMAGE_COLUMN].chunks:
        if pa.types.is_struct(chunk.type):
            # `field` ignores the struct's own nulls, `flatten` applies them.
            chunk = chunk.flatten()[chunk.type.get_field_index("bytes")]  # noqa: PLW2901
        found += [None if (buffer := value.as_buffer()) is None else memoryview(buffer) for value in chunk]
    return found


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index: int = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    checks: tuple[Any, ...] = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(check(kind) for check in checks) or bool(pa.types.is_fixed_size_binary(kind))
