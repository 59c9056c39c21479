"""Appending chosen rows of record batches to one parquet file in row groups of a fixed size, within bounded memory.

The vectors of a row group are gathered into one reused matrix, so a row is copied once between decoding and encoding.
Encoding runs on a worker thread while the next group is filled: two matrices a file, never more. Row groups depend on
the rows alone, not on the batches they came in, so the same rows give the same bytes.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from spatial_core.storage.parquet import vectors_to_arrow

# Encoding a list column takes about 10 bytes a value, which the parquet writer keeps until the file is closed: 40 MB
# for each of three files. Four times as much made nothing faster.
GROUP_VALUES = 1 << 22
_MAX_GROUP_ROWS = 65_536


def group_rows(dim: int) -> int:
    """Rows of about `GROUP_VALUES` vector values."""
    return max(1, min(_MAX_GROUP_ROWS, GROUP_VALUES // dim))


class RowGroupWriter:
    """Collects rows for one file and writes a row group whenever enough have come.

    Args:
        writer: the open file; its schema has one vector column, `vector`.
        schema: the file's schema.
        vector: name of the vector column.
        executor: where row groups are encoded, one at a time for this file.
    """

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema, vector: str, executor: Executor) -> None:
        self._writer = writer
        self._schema = schema
        self._vector = vector
        self._executor = executor
        kind = schema.field(vector).type
        dtype = np.dtype(kind.value_type.to_pandas_dtype())
        self._rows = group_rows(kind.list_size)
        # Untouched pages of these take no memory, so a small file costs little.
        self._spare = np.empty((self._rows, kind.list_size), dtype)
        self._matrix = np.empty_like(self._spare)
        self._filled = 0
        self._others: list[pa.RecordBatch] = []
        self._encoding: Future[None] | None = None
        self.rows = 0

    def add(self, others: pa.RecordBatch, matrix: npt.NDArray[Any], chosen: npt.NDArray[np.int64]) -> None:
        """Append rows `chosen` of a batch: `matrix` (N, D) its vectors, `others` its other columns."""
        while len(chosen):
            now, chosen = np.split(chosen, [self._rows - self._filled])
            end = self._filled + len(now)
            np.take(matrix, now, axis=0, out=self._matrix[self._filled : end], mode="clip")
            self._others.append(others.take(pa.array(now)))
            self._filled = end
            if end == self._rows:
                self._flush()

    def close(self) -> None:
        """Write what is left and wait for it. The file itself is closed by whoever opened it."""
        if self._filled:
            self._flush()
        self._wait()

    def _flush(self) -> None:
        self._wait()
        table = pa.Table.from_batches(self._others).combine_chunks()
        columns = {name: table.column(name) for name in table.column_names}
        columns[self._vector] = vectors_to_arrow(self._matrix[: self._filled])
        group = pa.table([columns[name] for name in self._schema.names], schema=self._schema)
        self.rows += self._filled
        self._matrix, self._spare = self._spare, self._matrix
        self._others, self._filled = [], 0
        self._encoding = self._executor.submit(self._writer.write_table, group, row_group_size=len(group))

    def _wait(self) -> None:
        if self._encoding is not None:
            self._encoding.result()
            self._encoding = None
