"""Rows that come one by one, written as row groups of a set size with little in memory."""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

# A row of Python objects takes some 1.5 KB, one in Arrow some 400 bytes.
_CHUNK_ROWS: Final = 4096


class TableBuffer:
    """Collects rows for a ParquetWriter.

    Args:
        writer: an open writer of `schema`.
        schema: columns of the rows.
        row_group_size: rows a row group; at most as many are held.
    """

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema, row_group_size: int) -> None:
        self.rows = 0
        self._writer = writer
        self._schema = schema
        self._row_group_size = row_group_size
        self._chunk: list[tuple[Any, ...]] = []
        self._batches: list[pa.RecordBatch] = []
        self._group_rows = 0

    def append(self, row: tuple[Any, ...]) -> None:
        """Add a row; its values are in the order of the schema's columns."""
        self._chunk.append(row)
        self.rows += 1
        self._group_rows += 1
        if self._group_rows >= self._row_group_size:
            self._write_group()
        elif len(self._chunk) >= _CHUNK_ROWS:
            self._convert()

    def finish(self) -> None:
        """Write what is left."""
        self._write_group()

    def _convert(self) -> None:
        if self._chunk:
            columns = zip(*self._chunk, strict=True)
            arrays = [pa.array(values, field.type) for values, field in zip(columns, self._schema, strict=True)]
            self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
            self._chunk = []

    def _write_group(self) -> None:
        self._convert()
        if self._batches:
            table = pa.Table.from_batches(self._batches, self._schema)
            self._writer.write_table(table, row_group_size=self._row_group_size)
            self._batches = []
        self._group_rows = 0
