"""Parquet conventions: vectors stay fixed-size, damage is noticed, provenance travels in the footer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spatial_core.errors import ArtifactError, InputError
from spatial_core.storage.digests import sha256_file
from spatial_core.storage.parquet import (
    open_parquet,
    parquet_sink,
    read_columns,
    read_provenance,
    vector_type,
    vectors_to_arrow,
    vectors_to_numpy,
)
from spatial_core.storage.provenance import Provenance

PROVENANCE = Provenance("embed", "1", "c0ffee", {}, {"tar": "ab"}, {"id": "m", "revision": "r"}, "p")


def write(path: Path, dtype: str, rows: int = 50, dim: int = 8) -> np.ndarray:
    matrix = np.random.default_rng(0).normal(size=(rows, dim)).astype(dtype)
    schema = pa.schema([pa.field("id", pa.string()), pa.field("embedding", vector_type(dim, dtype), nullable=False)])
    with parquet_sink(path, schema, PROVENANCE) as sink:
        for start in range(0, rows, 20):
            part = matrix[start : start + 20]
            ids = pa.array([str(start + row) for row in range(len(part))])
            sink.write_table(pa.table([ids, vectors_to_arrow(part)], schema=schema))
    return matrix


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_round_trip(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "a.parquet"
    matrix = write(path, dtype)
    column = read_columns(path, ["embedding"]).column("embedding")
    assert column.type == vector_type(8, dtype)
    np.testing.assert_array_equal(vectors_to_numpy(column), matrix)
    assert read_provenance(path) == PROVENANCE
    sliced = column.combine_chunks().slice(7, 5)
    np.testing.assert_array_equal(vectors_to_numpy(sliced), matrix[7:12])


def test_lists_of_the_earlier_pipeline_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"embedding": [[1.0, 2.0], [3.0, 4.0]]}), tmp_path / "old.parquet")
    column = read_columns(tmp_path / "old.parquet", ["embedding"]).column("embedding")
    np.testing.assert_array_equal(vectors_to_numpy(column), [[1, 2], [3, 4]])
    assert read_provenance(tmp_path / "old.parquet") is None


@pytest.mark.parametrize("values", [[[1.0], None], [[1.0], [1.0, 2.0]], [[1.0], [None]]])
def test_ragged_or_null_vectors_are_refused(values: list[object]) -> None:
    with pytest.raises(ArtifactError):
        vectors_to_numpy(pa.array(values, pa.list_(pa.float64())))


def test_a_flipped_bit_never_changes_values_silently(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    matrix = write(path, "float32")
    whole = path.read_bytes()
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(1)
    start, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    noticed = 0
    for place in range(start, end, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            column = read_columns(path, ["embedding"]).column("embedding")
        except ArtifactError as error:
            assert "rebuild" in str(error)
            noticed += 1
        else:  # a bit of the page header that means nothing to a reader, such as its statistics
            np.testing.assert_array_equal(vectors_to_numpy(column), matrix)
    assert noticed > 0.8 * len(range(start, end, 7))


def test_unreadable_files_name_path_and_column(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_parquet(tmp_path / "none.parquet")
    path = tmp_path / "a.parquet"
    write(path, "float32")
    with pytest.raises(InputError, match="missing column building_id; it has id, embedding"):
        open_parquet(path, ["building_id"])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a readable parquet file"):
        open_parquet(path)


def test_nothing_appears_when_writing_fails(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("id", pa.int64())])
    with pytest.raises(RuntimeError), parquet_sink(tmp_path / "a.parquet", schema) as sink:
        sink.write_table(pa.table({"id": [1]}, schema=schema))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_plain_vectors_read_the_same_and_only_they_are_uncompressed(tmp_path: Path) -> None:
    schema = pa.schema([("id", pa.string()), ("vector", vector_type(8)), ("place", pa.struct([("lat", pa.float64())]))])
    matrix = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)
    places = [{"lat": 45.0}] * 500
    table = pa.table([["a"] * 500, vectors_to_arrow(matrix), places], schema=schema)
    digests: dict[str, str] = {}
    with parquet_sink(tmp_path / "plain.parquet", schema, PROVENANCE, plain_vectors=True, digests=digests) as sink:
        sink.write_table(table)
    with parquet_sink(tmp_path / "packed.parquet", schema, PROVENANCE) as sink:
        sink.write_table(table)
    plain, packed = (pq.ParquetFile(tmp_path / f"{name}.parquet") for name in ("plain", "packed"))
    assert plain.read() == packed.read() == table
    assert plain.schema_arrow.equals(packed.schema_arrow, check_metadata=True)
    group = plain.metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {path: column.compression for path, column in columns.items()} == {
        "id": "ZSTD",
        "vector.list.element": "UNCOMPRESSED",
        "place.lat": "ZSTD",
    }
    assert "BYTE_STREAM_SPLIT" not in columns["vector.list.element"].encodings
    assert digests == {"plain.parquet": sha256_file(tmp_path / "plain.parquet")}
