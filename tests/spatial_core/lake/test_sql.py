"""SQL over the lake: every artifact is a view, names with quotes are no way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spatial_core.config.settings import Settings, load_settings
from spatial_core.errors import ConfigError, InputError
from spatial_core.lake.sql import query_lake, view_queries, write_result
from spatial_core.storage.parquet import parquet_sink, vector_type, vectors_to_arrow


def lake(folder: Path) -> Settings:
    """A lake in `folder` with one tar's embeddings, a split and a drop."""
    settings = load_settings(overrides=[f"paths.data_dir='''{folder}'''"], environ={})
    at = settings.locations
    for name, dtype in (("float32", "float32"), ("float16", "float16")):
        schema = pa.schema([pa.field("building_id", pa.string()), pa.field("embedding", vector_type(4, dtype))])
        matrix = np.arange(8, dtype=dtype).reshape(2, 4)
        table = pa.table([pa.array(["a", "b"]), vectors_to_arrow(matrix)], schema=schema)
        key = {"float32": "0901", "float16": "0902"}[name]
        at.intermediates_dir.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.drop_columns(["embedding"]), at.intermediates_dir / f"{key}.parquet")
        with parquet_sink(at.embeddings_dir / f"{key}_embeddings.parquet", schema) as sink:
            sink.write_table(table)
    at.merged_dir.mkdir(parents=True)
    pq.write_table(pa.table({"building_id": ["a"]}), at.merged_dir / "train.parquet")
    parts = at.final_embeddings_dir / "june" / "parts"
    parts.mkdir(parents=True)
    pq.write_table(pa.table({"OSMID": [1, 2], "embedding": [[1.0], [2.0]]}), parts / "rg00000_rb00000.parquet")
    return settings


@pytest.fixture(params=["lake", 'it\'s a "lake"; drop'])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    return lake(tmp_path / request.param)


def test_every_artifact_is_a_view_with_its_vectors(settings: Settings) -> None:
    assert set(view_queries(settings)) == {
        "intermediates", "tar_statistics", "backbone_embeddings", "train", "merged_splits", "final_embeddings"
    }  # fmt: skip
    rows = query_lake(settings, "select tar, building_id, embedding from backbone_embeddings order by all").fetchall()
    assert rows[1] == ("0901", "b", [4.0, 5.0, 6.0, 7.0])
    assert rows[3] == ("0902", "b", [4.0, 5.0, 6.0, 7.0])
    assert query_lake(settings, 'select "drop", count(*) from final_embeddings group by 1').fetchall() == [("june", 2)]
    assert query_lake(settings, "select split from merged_splits").fetchall() == [("train",)]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_results_are_written_as_files(settings: Settings, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    assert write_result(query_lake(settings, "select * from backbone_embeddings"), path) == 4
    assert path.stat().st_size
    with pytest.raises(ConfigError, match=r"\.csv or \.parquet"):
        write_result(query_lake(settings, "select 1"), tmp_path / "out.txt")


def test_a_result_that_cannot_be_written_says_where(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none/x\.csv: cannot be written"):
        write_result(query_lake(settings, "select 1"), tmp_path / "none" / "x.csv")


def test_a_damaged_file_hides_its_own_view_alone(settings: Settings) -> None:
    at = settings.locations
    at.fingerprints_dir.mkdir()
    (at.fingerprints_dir / "0901_fingerprints.parquet").write_bytes(b"PAR1 damaged")
    at.drops_dir.mkdir()
    pq.write_table(pa.table({"OSMID": [1], "image_bytes": [b"x"]}), at.drops_dir / "june.parquet")
    assert query_lake(settings, "select count(*) from intermediates").fetchall() == [(4,)]
    assert query_lake(settings, 'select "drop", OSMID from packaged_images').fetchall() == [("june", 1)]
    with pytest.raises(InputError, match=r"views made so far: .*; no view fingerprints: .*0901_fingerprints"):
        query_lake(settings, "select * from fingerprints")


def test_a_wrong_query_says_what_there_is(settings: Settings) -> None:
    with pytest.raises(InputError, match=r"fingerprints.*views made so far: intermediates"):
        query_lake(settings, "select * from fingerprints")
    with pytest.raises(InputError, match="sql: Parser Error"):
        query_lake(settings, "selekt 1")


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("copy (select 1) to '{file}'", "COPY"),
        ("create table a as select 1", "CREATE"),
        ("select 1; export database '{file}'", "EXPORT"),
        ("attach '{file}'", "ATTACH"),
    ],
)
def test_nothing_is_written_by_a_query(statement: str, kind: str, settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "written"
    with pytest.raises(InputError, match=f"sql: {kind} is no query; to write a result, use --output FILE"):
        query_lake(settings, statement.format(file=file))
    assert not file.exists()


@pytest.mark.parametrize(
    "query", ["show tables", "summarize train", "from train", "explain select 1", "pragma version"]
)
def test_looking_around_is_a_query(query: str, settings: Settings) -> None:
    assert query_lake(settings, query).fetchall()


def test_only_one_statement_is_run(settings: Settings) -> None:
    with pytest.raises(InputError, match="sql: 2 statements, and only one can be shown"):
        query_lake(settings, "select 1; select 2")
    assert query_lake(settings, "select 1; -- the end;").fetchall() == [(1,)]


def test_a_pivot_is_a_query(settings: Settings) -> None:
    pivot = "pivot backbone_embeddings on tar using count(*) group by building_id"
    assert query_lake(settings, pivot).columns == ["building_id", "0901", "0902"]
