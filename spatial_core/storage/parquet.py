"""Parquet conventions shared by every artifact: fixed-size vectors, page checksums, provenance in the footer.

Vectors are FixedSizeList<float32|float16>. float32 uses BYTE_STREAM_SPLIT + zstd, which was the smallest float32
encoding and the fastest compressed one to read of those measured. Files that are made anew from others may store plain
vectors instead: a sixth larger, and written in two thirds of the CPU time. Without page checksums a flipped bit in a
parquet file changes values silently, so they are written always and verified on every read here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from spatial_core.errors import ArtifactError, InputError
from spatial_core.storage.atomic import atomic_file
from spatial_core.storage.digests import HashedFile
from spatial_core.storage.provenance import FOOTER_KEY, Provenance

_BUFFER_BYTES = 1 << 20
# Strings repeat across a row group; the library's 1 MB would give up half-way through a large group.
_DICTIONARY_BYTES = 8 << 20


def vector_type(dim: int, dtype: str = "float32") -> pa.DataType:
    """Arrow type of a vector column: FixedSizeList of `dim` non-null float32 or float16 values."""
    value = {"float32": pa.float32(), "float16": pa.float16(), "uint8": pa.uint8()}[dtype]
    return pa.list_(pa.field("item", value, nullable=False), dim)


def vectors_to_arrow(matrix: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """(N, D) numpy matrix -> FixedSizeList array of length N, without copying a C-contiguous input."""
    rows, dim = matrix.shape
    kind = vector_type(dim, str(matrix.dtype))
    # `pa.array` of a numpy array would import pandas, half a second of every process.
    values = pa.py_buffer(np.ascontiguousarray(matrix).reshape(rows * dim))
    flat = pa.Array.from_buffers(kind.value_type, rows * dim, [None, values])
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def vectors_to_numpy(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """FixedSizeList or List vector column without nulls -> (N, D) numpy matrix of the stored type.

    Lists of variable type are accepted for files of the earlier pipeline, provided all are of one length.

    Raises:
        ArtifactError: on null vectors or vectors of different lengths.
    """
    if isinstance(column, pa.ChunkedArray):
        if column.num_chunks == 1:
            column = column.chunk(0)
        else:
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if column.null_count:
        raise ArtifactError(f"{column.null_count} null vectors in a column of {len(column)}")
    if pa.types.is_fixed_size_list(column.type):
        dim = column.type.list_size
    else:
        lengths = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
        if len(lengths) > 1:
            raise ArtifactError(f"vectors of different lengths in one column: {lengths[:5].tolist()}")
        dim = int(lengths[0]) if len(lengths) else 0
    values = column.flatten()
    if values.null_count:
        raise ArtifactError(f"{values.null_count} null values inside vectors")
    matrix: npt.NDArray[Any] = values.to_numpy(zero_copy_only=True).reshape(len(column), dim)
    return matrix


def write_options(schema: pa.Schema, *, plain_vectors: bool = False) -> dict[str, Any]:
    """Encoding for a schema: BYTE_STREAM_SPLIT on float columns, dictionary on strings and on lists of strings or ints.

    Everything else is plain, float16 too: DuckDB 2.0 cannot read it split, and it is stored for speed rather than for
    the last byte. With `plain_vectors` fixed-size lists are neither split nor compressed.
    """

    def splittable(kind: pa.DataType) -> bool:
        return bool(pa.types.is_float32(kind) or pa.types.is_float64(kind))

    split: list[str] = []
    dictionary: list[str] = []
    # Smallest and largest values are for skipping row groups, which nobody does by the values inside a vector.
    summarised = [field.name for field in schema if not pa.types.is_nested(field.type)]
    for field in schema:
        if plain_vectors and pa.types.is_fixed_size_list(field.type):
            continue
        if pa.types.is_fixed_size_list(field.type) or pa.types.is_list(field.type):
            if splittable(field.type.value_type):
                split.append(f"{field.name}.list.element")
            elif pa.types.is_string(field.type.value_type) or pa.types.is_signed_integer(field.type.value_type):
                dictionary.append(f"{field.name}.list.element")
        elif splittable(field.type):
            split.append(field.name)
        elif pa.types.is_string(field.type):
            dictionary.append(field.name)
    compression: str | dict[str, str] = "zstd"
    if plain_vectors:
        vectors = {field.name for field in schema if pa.types.is_fixed_size_list(field.type)}
        compression = {path: "none" if path.split(".")[0] in vectors else "zstd" for path in _leaves(schema)}
    return {
        "compression": compression,
        "compression_level": {path: 1 for path, codec in compression.items() if codec == "zstd"}
        if isinstance(compression, dict)
        else 1,
        "use_dictionary": dictionary,
        "dictionary_pagesize_limit": _DICTIONARY_BYTES,
        "use_byte_stream_split": split or False,
        "write_statistics": summarised,
        "write_page_checksum": True,
        "store_schema": True,
    }


def _leaves(schema: pa.Schema) -> list[str]:
    """Dotted paths of the parquet columns of a schema."""
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, schema).close()
    columns = pq.ParquetFile(sink.getvalue()).schema
    return [columns.column(i).path for i in range(len(columns))]


@contextlib.contextmanager
def parquet_sink(
    path: Path,
    schema: pa.Schema,
    provenance: Provenance | None = None,
    *,
    plain_vectors: bool = False,
    digests: dict[str, str] | None = None,
) -> Iterator[pq.ParquetWriter]:
    """A ParquetWriter under our conventions whose file appears at `path` only when the block ends without error.

    Args:
        path: the file.
        schema: its columns.
        provenance: kept in its footer.
        plain_vectors: see `write_options`.
        digests: gets the SHA-256 of the finished file under its name.
    """
    metadata = dict(schema.metadata or {})
    if provenance is not None:
        metadata[FOOTER_KEY] = provenance.to_json().encode()
    schema = schema.with_metadata(metadata or None)
    options = write_options(schema, plain_vectors=plain_vectors)
    with atomic_file(path) as temporary:
        if digests is None:
            with pq.ParquetWriter(temporary, schema, **options) as writer:
                yield writer
        else:
            with temporary.open("wb") as file:
                hashed = HashedFile(file)
                with pq.ParquetWriter(hashed, schema, **options) as writer:
                    yield writer
            digests[path.name] = hashed.sha256


def open_parquet(path: Path, required: Sequence[str] = (), *, memory_map: bool = True) -> pq.ParquetFile:
    """Open for reading with page checksums verified, memory-mapped unless told otherwise.

    A mapped file's pages count as the process's memory once touched; without the map the file is read through a small
    buffer, which is what a pass over a large file within bounded memory wants.

    Raises:
        InputError: if the file is missing, is not parquet, or lacks a required column; names path and column.
    """
    try:
        file = pq.ParquetFile(
            path,
            memory_map=memory_map,
            buffer_size=0 if memory_map else _BUFFER_BYTES,
            pre_buffer=memory_map,  # the library keeps what it has read ahead until the file is closed
            page_checksum_verification=True,
        )
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error
    missing = [name for name in required if name not in file.schema_arrow.names]
    if missing:
        raise InputError(f"{path}: missing column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}")
    return file


def read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    """Read some columns of one file, checksums verified.

    Raises:
        InputError: as `open_parquet`.
        ArtifactError: if a page is damaged.
    """
    file = open_parquet(path, required=columns)
    try:
        return file.read(columns=list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactError(f"{path}: damaged page ({str(error).splitlines()[0]}); rebuild this file") from error


def stream_batches(path: Path, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of at most `rows` rows of some columns, in file order, holding about one batch at a time.

    Raises:
        InputError: as `open_parquet`.
        ArtifactError: if a page is damaged.
    """
    file = open_parquet(path, required=columns, memory_map=False)
    try:
        yield from file.iter_batches(batch_size=rows, columns=list(columns), use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactError(f"{path}: damaged page ({str(error).splitlines()[0]}); rebuild this file") from error


def read_provenance(path: Path) -> Provenance | None:
    """Provenance from a parquet footer, or None for a file that another program wrote."""
    # The file's own metadata, not the Arrow schema's: a stage may add provenance when it closes the file.
    text = (open_parquet(path).metadata.metadata or {}).get(FOOTER_KEY)
    return None if text is None else Provenance.from_json(text)
