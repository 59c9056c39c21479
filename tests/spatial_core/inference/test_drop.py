"""Reading drops in chunks: exact boundaries, only the row groups that are wanted, real pictures."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spatial_core.config.settings import Settings
from spatial_core.errors import InputError
from spatial_core.inference.drop import Chunk, image_buffers, open_drop, read_chunks, validity
from spatial_core.inference.embed_new import embed_parquet
from spatial_core.inference.pooling import pool_buildings
from spatial_core.storage.parquet import vectors_to_numpy
from tests.data.make_model import write_drop


@pytest.mark.parametrize("row_group_size", [7, 10, 64])
@pytest.mark.parametrize("size", [1, 3, 10, 1000])
def test_chunks_cover_every_row_once_in_order(row_group_size: int, size: int, tmp_path: Path) -> None:
    data = [str(row).encode() for row in range(50)]
    drop = open_drop(write_drop(tmp_path / "d.parquet", data, list(range(50)), row_group_size=row_group_size))
    chunks = drop.chunks(size)
    seen: list[Any] = []
    for chunk, table in read_chunks(drop, chunks, size):
        assert chunk.first_row == len(seen)
        assert table["OSMID"].to_pylist() == list(range(chunk.first_row, chunk.first_row + chunk.rows))
        assert [bytes(item or b"") for item in image_buffers(table)] == data[chunk.first_row :][: chunk.rows]
        seen += table["OSMID"].to_pylist()
    assert seen == list(range(50))
    assert [chunk.name for chunk in chunks] == sorted({chunk.name for chunk in chunks})


def test_only_wanted_row_groups_are_read(tmp_path: Path) -> None:
    images = [bytes([row]) * 300 for row in range(30)]
    path = write_drop(tmp_path / "d.parquet", images, list(range(30)), row_group_size=10)
    data = bytearray(path.read_bytes())
    data[bytes(data).index(images[15]) + 5] ^= 1
    path.write_bytes(bytes(data))
    drop = open_drop(path)
    wanted = [chunk for chunk in drop.chunks(5) if chunk.row_group != 1]
    assert [chunk.first_row for chunk, _ in read_chunks(drop, wanted, 5)] == [0, 5, 20, 25]
    with pytest.raises(InputError, match="row group 1 is damaged"):
        list(read_chunks(drop, drop.chunks(5), 5))


def test_part_names_keep_their_order_beyond_five_digits() -> None:
    assert Chunk(3, 12, 0, 1).name == "rg00003_rb00012.parquet"


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int8(), pa.null()])
def test_validity_of_every_type(kind: pa.DataType) -> None:
    values = [None, None, None] if pa.types.is_null(kind) else [1, 0, None]
    column = pa.array([None if value is None else kind.to_pandas_dtype()(value) for value in values], kind)
    valid, unknown = validity(pa.table({"is_valid": column}))
    assert valid.tolist() == [value == 1 for value in values]
    assert unknown.tolist() == [value is None for value in values]


@pytest.mark.real_data
@pytest.mark.parametrize("kind", [pa.string(), pa.int64(), pa.decimal128(20, 2)])
def test_real_photographs_with_identifiers_of_every_kind(
    kind: pa.DataType, real_data: Path, tmp_path: Path, settings: Callable[..., Settings]
) -> None:
    images, names = [], []
    for name in ("0201.tar", "0202.tar"):
        with tarfile.open(real_data / "buildings" / name) as tar:
            for member in tar:
                handle = tar.extractfile(member)
                if member.name.endswith((".jpg", ".jpeg")) and handle is not None:
                    images.append(handle.read())
                    names.append(int(Path(member.name).stem.rsplit("_", 1)[1]))
    make: Callable[[int], Any] = {pa.string(): str, pa.int64(): int}.get(kind, lambda name: Decimal(name) / 4)
    ids = pa.array([make(name) for name in names], kind)
    drop = write_drop(tmp_path / "real.parquet", images, ids)
    report = embed_parquet(drop, tmp_path / "real", settings("inference.batch_size=32"))
    assert (report.rows, report.rows_in, dict(report.rejected)) == (60, 60, {})
    tables = [pq.read_table(part) for part in sorted((tmp_path / "real" / "parts").iterdir())]
    found = pa.concat_tables([table.replace_schema_metadata() for table in tables])
    assert found["OSMID"].combine_chunks().equals(ids)
    np.testing.assert_allclose(np.linalg.norm(vectors_to_numpy(found["embedding"]), axis=1), 1, atol=1e-5)
    pooled = pool_buildings(tmp_path / "real", tmp_path / "buildings.parquet", settings())
    assert pooled.rows == len(set(names))
    assert pq.read_schema(tmp_path / "buildings.parquet").field("OSMID").type == kind
