"""Pooling against a plain loop, for identifiers of every type and vectors of every misfortune."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError, InputError
from spatial_core.inference.pooling import pool_buildings
from spatial_core.storage.parquet import vectors_to_arrow, vectors_to_numpy

DIM = 16
IDS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "string": (pa.string(), ["way/1", "Weg äöü", "", "x" * 500]),
    "large_string": (pa.large_string(), ["a", "b", "c", "d"]),
    "int64": (pa.int64(), [2**62, -1, 0, 7]),
    "uint64": (pa.uint64(), [2**64 - 1, 1, 0, 7]),
    "float64": (pa.float64(), [0.1, -1e300, 5.0, 1e-9]),
    "float16": (pa.float16(), [np.float16(0.5), np.float16(-2), np.float16(9), np.float16(0)]),
    "decimal": (pa.decimal128(38, 4), [Decimal("123456789012345678901234567890.1234"), *map(Decimal, "123")]),
    "uuid_bytes": (pa.binary(16), [uuid.UUID(int=n).bytes for n in range(4)]),
    "uuid": (pa.uuid(), [uuid.UUID(int=n).bytes for n in range(4)]),
    "bool_like_date": (pa.date32(), [dt.date(2026, 1, n) for n in (1, 2, 3, 4)]),
    "timestamp": (pa.timestamp("us", tz="UTC"), [dt.datetime(2026, 1, n, tzinfo=dt.UTC) for n in (1, 2, 3, 4)]),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), ["a", "b", "c", "d"]),
}


def unit(rows: int, seed: int, dim: int = DIM) -> npt.NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def ids_array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        return kind.wrap_array(pa.array(values, kind.storage_type))
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    return pa.array(values, kind)


def write_data_set(root: Path, parts: list[tuple[pa.Array, npt.NDArray[np.float32]]], **state: Any) -> Path:
    (root / "parts").mkdir(parents=True)
    for number, (ids, vectors) in enumerate(parts):
        schema = schemas.final_embeddings(ids.type, vectors.shape[1])
        table = pa.Table.from_arrays([ids, vectors_to_arrow(vectors)], schema=schema)
        pq.write_table(table, root / "parts" / f"rg00000_rb{number:05d}.parquet", write_page_checksum=True)
    (root / "state.json").write_text(json.dumps({"finished": True, **state}))
    return root


def naive_pool(ids: list[Any], vectors: npt.NDArray[np.float32]) -> dict[Any, tuple[npt.NDArray[Any], int, float]]:
    groups: dict[Any, list[npt.NDArray[Any]]] = {}
    for name, vector in zip(ids, vectors, strict=True):
        if name is not None:
            groups.setdefault(name, []).append(vector.astype(np.float64))
    pooled = {}
    for name, members in groups.items():
        mean = sum(members) / len(members)
        length = float(np.linalg.norm(mean))
        pooled[name] = (mean / length, len(members), length)
    return pooled


@pytest.mark.parametrize("kind", IDS)
def test_identifiers_of_every_type_come_through_unchanged(kind: str, tmp_path: Path) -> None:
    arrow_type, values = IDS[kind]
    order = [2, 0, 2, 3, 1, 0, 2, 1]
    ids = [values[place] for place in order]
    vectors = unit(len(ids), seed=1)
    halves = [(ids_array(ids[:5], arrow_type), vectors[:5]), (ids_array(ids[5:], arrow_type), vectors[5:])]
    root = write_data_set(tmp_path / "drop", halves)

    report = pool_buildings(root, tmp_path / "buildings.parquet", Settings())

    table = pq.read_table(tmp_path / "buildings.parquet")
    assert table.schema.field("OSMID").type == arrow_type
    first_seen = ids_array([values[place] for place in (2, 0, 3, 1)], arrow_type)
    assert table["OSMID"].combine_chunks().to_pylist() == first_seen.to_pylist()
    expected = list(naive_pool([bytes(i) if isinstance(i, bytes) else i for i in ids], vectors).values())
    np.testing.assert_allclose(vectors_to_numpy(table["embedding"]), [row[0] for row in expected], atol=1e-6)
    assert table["images"].to_pylist() == [row[1] for row in expected]
    np.testing.assert_allclose(table["coherence"].to_numpy(), [row[2] for row in expected], atol=1e-6)
    assert (report.rows, report.rows_in, report.kept, report.rejected) == (4, 8, 8, {})


def test_null_identifiers_are_rejected_with_their_reason(tmp_path: Path) -> None:
    root = write_data_set(tmp_path / "drop", [(pa.array(["a", None, "a", None], pa.string()), unit(4, 2))])
    report = pool_buildings(root, tmp_path / "out.parquet", Settings())
    assert report.rejected == {"osmid_null": 2}
    assert pq.read_table(tmp_path / "out.parquet")["OSMID"].to_pylist() == ["a"]


def test_building_whose_vectors_cancel_out_has_no_vector(tmp_path: Path) -> None:
    vectors = unit(3, 3)
    vectors[1] = -vectors[0]
    root = write_data_set(tmp_path / "drop", [(pa.array([1, 1, 2]), vectors)])
    report = pool_buildings(root, tmp_path / "out.parquet", Settings())
    assert report.rejected == {"vectors_cancel_out": 2}
    assert report.details["cancelled_buildings"] == ["1"]
    assert pq.read_table(tmp_path / "out.parquet")["OSMID"].to_pylist() == [2]


def test_same_data_set_again_does_nothing_and_a_changed_one_is_pooled_anew(tmp_path: Path) -> None:
    root = write_data_set(tmp_path / "drop", [(pa.array([1, 2]), unit(2, 4))])
    out = tmp_path / "out.parquet"
    pool_buildings(root, out, Settings())
    first = out.read_bytes()
    assert pool_buildings(root, out, Settings()).up_to_date
    out.unlink()
    assert not pool_buildings(root, out, Settings()).up_to_date
    assert out.read_bytes() == first
    write_data_set(tmp_path / "other", [(pa.array([3]), unit(1, 5))])
    assert pool_buildings(tmp_path / "other", out, Settings()).rows == 1


def test_lists_of_the_earlier_pipeline_and_its_empty_parts_are_read(tmp_path: Path) -> None:
    parts = tmp_path / "drop" / "parts"
    parts.mkdir(parents=True)
    vectors = unit(2, 6)
    empty = pa.table({"OSMID": pa.array([], pa.int64()), "embedding": pa.array([], pa.list_(pa.float32()))})
    full = pa.table({"OSMID": [5, 5], "embedding": pa.array(list(vectors), pa.list_(pa.float32()))})
    pq.write_table(empty, parts / "rg00000_rb00000.parquet")
    pq.write_table(full, parts / "rg00000_rb00001.parquet")
    (tmp_path / "drop" / "state.json").write_text(json.dumps({"input_path": "x"}))
    assert pool_buildings(tmp_path / "drop", tmp_path / "out.parquet", Settings()).rows == 1


def test_data_set_without_any_row_gives_an_empty_table(tmp_path: Path) -> None:
    root = write_data_set(tmp_path / "drop", [(pa.array([], pa.string()), unit(0, 0))])
    report = pool_buildings(root, tmp_path / "out.parquet", Settings())
    assert report.rows == 0
    assert pq.read_schema(tmp_path / "out.parquet").field("embedding").type.list_size == DIM


def test_unfinished_missing_or_damaged_data_sets_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    with pytest.raises(InputError, match="no data set"):
        pool_buildings(tmp_path / "nothing", out, Settings())
    unfinished = write_data_set(tmp_path / "a", [(pa.array([1]), unit(1, 1))], finished=False, rows_done=1)
    with pytest.raises(InputError, match="unfinished"):
        pool_buildings(unfinished, out, Settings())
    bad = unit(2, 1)
    bad[1, 3] = np.nan
    with pytest.raises(ArtifactError, match="not finite"):
        pool_buildings(write_data_set(tmp_path / "b", [(pa.array([1, 2]), bad)]), out, Settings())
    widths = [(pa.array([1]), unit(1, 1)), (pa.array([1]), unit(1, 1, dim=8))]
    with pytest.raises(ArtifactError, match="8 wide among others 16 wide"):
        pool_buildings(write_data_set(tmp_path / "c", widths), out, Settings())
    types = [(pa.array([1]), unit(1, 1)), (pa.array(["1"]), unit(1, 1))]
    with pytest.raises(ArtifactError, match="several types"):
        pool_buildings(write_data_set(tmp_path / "d", types), out, Settings())
    damaged = write_data_set(tmp_path / "e", [(pa.array([1] * 50), unit(50, 1))])
    part = damaged / "parts" / "rg00000_rb00000.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged page"):
        pool_buildings(damaged, out, Settings())
    assert not out.exists()
