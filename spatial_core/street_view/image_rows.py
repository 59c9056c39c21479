"""Rows of intermediates and the image bytes they point to: what every stage that rereads a tar starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from spatial_core import schemas
from spatial_core.errors import ArtifactError, InputError
from spatial_core.images.byte_ranges import TarImages
from spatial_core.storage.parquet import open_parquet, stream_batches

LOCATORS = ("tar_file", "image_path", "image_offset", "image_bytes", "image_sha256")
ALL_COLUMNS = tuple(schemas.INTERMEDIATES.names)


def require_same_key(intermediates: Path, tar: Path) -> None:
    """Refuse intermediates that are not called as ingest calls those of this tar, wherever they lie.

    Artifacts are named after them, and the columns do not tell: a tar's embeddings have them all.

    Raises:
        InputError: saying which file is expected.
    """
    expected = f"{tar.stem}.parquet"
    if intermediates.name != expected:
        raise InputError(f"{intermediates}: expected {expected}, which ingest makes of {tar.name}")


def count_rows(intermediates: Path) -> int:
    """Rows of a tar's intermediates, their schema checked.

    Raises:
        InputError: if the file is missing, not parquet, or has no rows.
        ArtifactError: if it lacks a column, as files of the earlier pipeline do; ingest makes them.
    """
    file = open_parquet(intermediates)
    schemas.require(file.schema_arrow, list(schemas.INTERMEDIATES), f"{intermediates} (make it with the ingest stage)")
    rows: int = file.metadata.num_rows
    if not rows:
        raise InputError(f"{intermediates}: no rows")
    return rows


def row_blocks(intermediates: Path, tar: Path, columns: Sequence[str], rows: int) -> Iterator[pa.Table]:
    """Consecutive blocks of exactly `rows` rows (the last one may be shorter), however the file is cut.

    Raises:
        InputError: if a row belongs to another tar.
        ArtifactError: if a page is damaged, or one of `columns` that may not be null is.
    """
    start = 0
    held: list[pa.RecordBatch] = []
    have = 0
    for batch in stream_batches(intermediates, [*columns], rows):
        held.append(batch)
        have += len(batch)
        while have >= rows:
            table = pa.Table.from_batches(held)
            yield _checked(table.slice(0, rows), intermediates, tar, start)
            start += rows
            have -= rows
            held = table.slice(rows).to_batches()
    if have:
        yield _checked(pa.Table.from_batches(held), intermediates, tar, start)


def byte_readers(images: TarImages, block: pa.Table) -> list[Callable[[], memoryview]]:
    """One function a row that reads the image and checks its digest; needs the `LOCATORS` columns."""

    def reader(offset: int, length: int, sha256: str) -> Callable[[], memoryview]:
        return lambda: images.verified(offset, length, sha256)

    columns = [block.column(name).to_pylist() for name in ("image_offset", "image_bytes", "image_sha256")]
    return [reader(*row) for row in zip(*columns, strict=True)]


def unreadable(tar: Path, block: pa.Table, row: int, cause: str) -> InputError:
    """The error for an image that was accepted when it was ingested and is not any more."""
    path, offset = (block.column(name)[row].as_py() for name in ("image_path", "image_offset"))
    return InputError(f"{tar}: byte {offset}: {path}: {cause}, though ingest accepted it; ingest this tar again")


def _checked(block: pa.Table, intermediates: Path, tar: Path, start: int) -> pa.Table:
    for name in block.column_names:
        column = block.column(name)
        if column.null_count and not schemas.INTERMEDIATES.field(name).nullable:
            raise ArtifactError(f"{intermediates}: {column.null_count} null values in {name}; ingest this tar again")
    if "tar_file" in block.column_names:
        foreign = pc.index(pc.not_equal(block.column("tar_file"), tar.name), True).as_py()
        if foreign >= 0:
            found = block.column("tar_file")[foreign].as_py()
            raise InputError(f"{intermediates}: row {start + foreign} belongs to {found}, not to {tar.name}")
    return block
