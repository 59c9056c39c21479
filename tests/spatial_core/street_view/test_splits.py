"""Stage merge on real parquet files: what is kept, refused, and left behind when it fails."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactBusy, ArtifactError, InputError, StorageFull
from spatial_core.report import Report
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.digests import sha256_file
from spatial_core.storage.parquet import parquet_sink, read_provenance, vectors_to_arrow, vectors_to_numpy
from spatial_core.storage.provenance import Provenance, manifest_path, verify_artifact
from spatial_core.street_view import splits
from spatial_core.street_view.split_assignment import SPLITS, assign_splits
from spatial_core.street_view.splits import merge_splits

DIM = 8
MODEL = {"id": "m", "revision": "r", "pooling_type": "cls_token"}
PROVENANCE = Provenance("embed", "1", "0" * 64, model=MODEL, preprocessing="p1")


def settings(**data: Any) -> Settings:
    return Settings(data=data)


def images(dataset: int, buildings: int, *, seed: int = 0, dim: int = DIM, dtype: str = "float32") -> pa.Table:
    """Shuffled rows of one data set; building 0, 5, 10, ... has one image, the others two to four."""
    rng = np.random.default_rng([seed, dataset])
    views = np.where(np.arange(buildings) % 5 == 0, 1, rng.integers(2, 5, buildings))
    target = rng.permutation(np.repeat(np.arange(buildings), views))
    count = len(target)
    patch = np.arange(count)
    place = np.random.default_rng(dataset).uniform(0, 0.05, (buildings, 2))
    columns: dict[str, Any] = {
        "dataset_id": np.full(count, dataset),
        "target_id": target,
        "patch_id": patch,
        "street_view_id": patch + 1000,
        "target_lat": 45 + place[target, 0],
        "target_lon": 9 + place[target, 1],
        "building_id": [f"{dataset:04d}_{number}" for number in target],
        "streetview_image_id": [f"{dataset:04d}_{number}" for number in patch],
        "image_path": [f"{number}.jpg" for number in patch],
        "tar_file": [f"{dataset:04d}.tar"] * count,
        "embedding": vectors_to_arrow(rng.standard_normal((count, dim)).astype(dtype)),
    }
    schema = schemas.embeddings(dim, dtype)
    for field in schema:
        if field.name not in columns:
            values = rng.integers(0, 100, count)
            columns[field.name] = pa.array(values).cast(field.type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def write(directory: Path, table: pa.Table, dataset: int, provenance: Provenance | None = PROVENANCE) -> Path:
    path = directory / f"{dataset:04d}_embeddings.parquet"
    with parquet_sink(path, table.schema, provenance) as writer:
        writer.write_table(table, row_group_size=37)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    directory = tmp_path / "embeddings"
    for dataset in (61, 62, 7):
        write(directory, images(dataset, 60), dataset)
    return directory


def replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    at = table.schema.get_field_index(name)
    field = table.schema.field(at)
    array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, field.type)
    return table.set_column(at, field.with_type(array.type).with_nullable(True), array)


def read(directory: Path) -> dict[str, pa.Table]:
    return {name: pq.read_table(directory / f"{name}.parquet") for name in SPLITS}


def splits_of(directory: Path) -> dict[str, str]:
    return {
        building: name
        for name, table in read(directory).items()
        for building in table.column("building_id").to_pylist()
    }


def bytes_of(directory: Path) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in sorted(directory.iterdir())}


def test_every_row_is_in_one_split_or_a_counted_singleton(shards: Path, tmp_path: Path) -> None:
    report = merge_splits(shards, tmp_path / "merged", settings())
    source = pa.concat_tables([pq.read_table(path) for path in sorted(shards.glob("*.parquet"))])
    views = Counter(source.column("building_id").to_pylist())
    expected = source.filter(pa.array([views[name] > 1 for name in source.column("building_id").to_pylist()]))
    expected = expected.drop_columns(["image_path", "tar_file"])
    merged = read(tmp_path / "merged")
    # Each split is the kept rows of its buildings, in input order, every column and value as it was.
    for name, table in merged.items():
        mine = set(table.column("building_id").to_pylist())
        rows = [building in mine for building in expected.column("building_id").to_pylist()]
        assert table.equals(expected.filter(pa.array(rows)))
        assert table.schema.equals(schemas.splits(DIM, "float32")), name
    owners = [set(table.column("building_id").to_pylist()) for table in merged.values()]
    assert sum(map(len, owners)) == len(set().union(*owners)) == sum(count > 1 for count in views.values())
    assert report.rows_in == len(source)
    assert report.rows == report.kept == len(expected) == sum(map(len, merged.values()))
    assert report.rejected == {"singleton_building": sum(count == 1 for count in views.values())}


def test_report_says_what_was_made(shards: Path, tmp_path: Path) -> None:
    report = merge_splits(shards, tmp_path / "merged", settings(split_strategy="spatial_block"))
    stored = json.loads((tmp_path / "merged" / "report.json").read_text())
    assert stored == json.loads(json.dumps(dict(report.details)))
    assert stored["strategy"] == "spatial_block"
    assert stored["block_size_m"] == 500.0
    for name, table in read(tmp_path / "merged").items():
        assert stored["images"][name] == len(table)
        assert stored["buildings"][name] == len(set(table.column("building_id").to_pylist()))
    assert set(stored["leakage"]["test"]) >= {"share_within_25m", "share_within_50m"}
    assert set(stored["leakage"]) == {"val", "test"}
    assert list(stored["inputs"]) == ["0007_embeddings.parquet", "0061_embeddings.parquet", "0062_embeddings.parquet"]
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "merged").iterdir())


def test_footer_carries_model_preprocessing_and_input_digests(shards: Path, tmp_path: Path) -> None:
    merge_splits(shards, tmp_path / "merged", settings())
    verify_artifact(tmp_path / "merged")
    provenance = read_provenance(tmp_path / "merged" / "val.parquet")
    assert provenance is not None
    assert provenance.model == MODEL
    assert provenance.preprocessing == "p1"
    assert provenance.inputs == {path.name: sha256_file(path) for path in shards.glob("*.parquet")}


def test_a_second_run_does_nothing_and_a_changed_setting_does(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    first = merge_splits(shards, out, settings())
    stamp = (out / "train.parquet").stat().st_mtime_ns
    again = merge_splits(shards, out, settings())
    assert again.up_to_date
    assert again.rows == first.rows
    assert (out / "train.parquet").stat().st_mtime_ns == stamp
    assert not merge_splits(shards, out, settings(train_ratio=0.5, val_ratio=0.35)).up_to_date


def test_the_same_inputs_give_the_same_bytes_whatever_the_batches(shards: Path, tmp_path: Path) -> None:
    merge_splits(shards, tmp_path / "a", settings())
    merge_splits(shards, tmp_path / "b", settings())
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    merge_splits(shards, tmp_path / "c", settings(batch_size=11))
    for name, table in read(tmp_path / "c").items():
        assert table.equals(read(tmp_path / "a")[name])


@pytest.mark.parametrize("strategy", ["building", "spatial_block"])
def test_adding_tars_moves_no_building(shards: Path, tmp_path: Path, strategy: str) -> None:
    merge_splits(shards, tmp_path / "merged", settings(split_strategy=strategy))
    before = splits_of(tmp_path / "merged")
    write(shards, images(3, 80), 3)
    write(shards, images(99, 80), 99)
    merge_splits(shards, tmp_path / "merged", settings(split_strategy=strategy))
    after = splits_of(tmp_path / "merged")
    assert len(after) > len(before)
    assert {building: after[building] for building in before} == before


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_vectors_keep_their_type(tmp_path: Path, dtype: str) -> None:
    table = images(5, 30, dtype=dtype)
    write(tmp_path / "in", table, 5)
    merge_splits(tmp_path / "in", tmp_path / "out", settings(train_ratio=1, val_ratio=0, test_ratio=0))
    train = read(tmp_path / "out")["train"]
    assert train.schema.field("embedding").type == table.schema.field("embedding").type
    wanted = dict(
        zip(table.column("streetview_image_id").to_pylist(), vectors_to_numpy(table["embedding"]), strict=True)
    )
    assert len(train)
    for name, vector in zip(
        train["streetview_image_id"].to_pylist(), vectors_to_numpy(train["embedding"]), strict=True
    ):
        assert np.array_equal(vector, wanted[name])


def test_a_split_without_rows_is_a_valid_empty_file(tmp_path: Path) -> None:
    write(tmp_path / "in", images(5, 30), 5)
    merge_splits(tmp_path / "in", tmp_path / "out", settings(train_ratio=1, val_ratio=0, test_ratio=0))
    test = read(tmp_path / "out")["test"]
    assert len(test) == 0
    assert test.schema.equals(schemas.splits(DIM, "float32"))


def test_row_groups_are_bounded_and_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spatial_core.street_view.split_writer.GROUP_VALUES", 50 * DIM)
    for dataset in (5, 6):
        write(tmp_path / "in", images(dataset, 100), dataset)
    report = merge_splits(tmp_path / "in", tmp_path / "out", settings(train_ratio=1, val_ratio=0, test_ratio=0))
    metadata = pq.read_metadata(tmp_path / "out" / "train.parquet")
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sizes[:-1] == [50] * (report.rows // 50)
    assert sum(sizes) == report.rows


def foreign(table: pa.Table) -> pa.Table:
    """As the earlier pipeline wrote it: identity, paths, then list<double>."""
    names = [*(field.name for field in schemas.IDENTITY), "image_path", "tar_file"]
    vectors = pa.array(vectors_to_numpy(table["embedding"]).astype(np.float64).tolist(), pa.list_(pa.float64()))
    return pa.table([*(table.column(name) for name in names), vectors], names=[*names, "embedding"])


def test_files_of_the_earlier_pipeline_are_merged(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tables = {dataset: images(dataset, 40) for dataset in (61, 62)}
    for dataset, table in tables.items():
        pq.write_table(foreign(table), tmp_path / "in" / f"{dataset:04d}_embeddings.parquet", compression="snappy")
    merge_splits(tmp_path / "in", tmp_path / "out", settings())
    merged = pa.concat_tables(read(tmp_path / "out").values())
    assert merged.schema.names == [*(field.name for field in schemas.IDENTITY), "embedding"]
    assert merged.schema.field("embedding").type == pa.list_(pa.field("item", pa.float32(), nullable=False), DIM)
    for dataset, table in tables.items():
        wanted = dict(
            zip(table.column("streetview_image_id").to_pylist(), vectors_to_numpy(table["embedding"]), strict=True)
        )
        mine = merged.filter(pc.equal(merged["dataset_id"], dataset))
        names = mine["streetview_image_id"].to_pylist()
        for name, vector in zip(names, vectors_to_numpy(mine["embedding"]), strict=True):
            assert np.array_equal(vector, wanted[name])


def test_a_column_every_input_has_is_kept_and_one_only_some_have_is_not(tmp_path: Path) -> None:
    for dataset in (5, 6):
        table = images(dataset, 20)
        table = table.append_column("everywhere", pa.array([None, *range(1, len(table))], pa.int32()))
        if dataset == 5:
            table = table.append_column("somewhere", pa.array(range(len(table))))
        write(tmp_path / "in", table, dataset)
    merge_splits(tmp_path / "in", tmp_path / "out", settings())
    names = read(tmp_path / "out")["train"].schema.names
    assert names == [*schemas.splits(DIM, "float32").names, "everywhere"]


# What must be refused -------------------------------------------------------------------------------------------


def broken(name: str, change: Any) -> Any:
    def make(table: pa.Table) -> pa.Table:
        values = table.column(name).to_pylist()
        values[3] = change(values)
        return replaced(table, name, values)

    return make


def with_vector(value: Any) -> Any:
    def make(table: pa.Table) -> pa.Table:
        matrix = vectors_to_numpy(table["embedding"]).copy()
        matrix[3, 1] = value
        return replaced(table, "embedding", vectors_to_arrow(matrix))

    return make


def without_vector(table: pa.Table) -> pa.Table:
    vectors = table["embedding"].to_pylist()
    return replaced(table, "embedding", [None if i == 43 else vector for i, vector in enumerate(vectors)])


def long_vector(value: float) -> Any:
    return broken("embedding", lambda _: [value] * DIM)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken("building_id", lambda _: "62_1"), "row 3 has building_id '62_1'"),
        (broken("building_id", lambda _: None), "row 3 has no building_id"),
        (broken("building_id", lambda _: "unknown"), "row 3 has building_id 'unknown'"),
        (broken("dataset_id", lambda _: None), "row 3 has no dataset_id"),
        (broken("streetview_image_id", lambda values: values[0]), "row 3 has streetview_image_id"),
        (broken("target_lat", lambda _: float("nan")), "row 3 has target_lat nan"),
        (broken("target_lon", lambda _: 181.0), "target_lon 181.0"),
        (broken("target_lat", lambda _: None), "row 3 has target_lat"),
        (with_vector(float("nan")), "row 3 has a vector with values that are not finite"),
        (with_vector(float("-inf")), "row 3 has a vector with values that are not finite"),
        (without_vector, "row 43 has no embedding"),
        (long_vector(3e38), "row 3 has a vector with values up to 3e+38: float32 cannot hold the square of its length"),
        (long_vector(1e-30), "row 3 has a vector with values up to 1e-30: float32 cannot hold the square"),
        (long_vector(0.0), "row 3 has a vector of zeros only"),
        (
            lambda table: pa.concat_tables([table, table.slice(4, 1)]),
            "streetview_image_id 0062_4 occurs more than once",
        ),
    ],
)
def test_a_bad_row_is_refused_and_nothing_is_published(shards: Path, tmp_path: Path, make: Any, message: str) -> None:
    write(shards, make(images(62, 60)), 62)
    with pytest.raises(ArtifactError, match=r"0062_embeddings\.parquet") as caught:
        merge_splits(shards, tmp_path / "merged", settings())
    assert message in str(caught.value)
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged.*.partial"))


def test_long_vectors_of_half_precision_are_vectors(tmp_path: Path) -> None:
    """Their squares overflow float16, and so would a sum of them."""
    longest = float(np.finfo(np.float16).max)
    table = images(61, 40, dtype="float16")
    write(tmp_path / "in", broken("embedding", lambda _: [longest] * DIM)(table), 61)
    kept = merge_splits(tmp_path / "in", tmp_path / "out", settings()).kept
    assert kept
    write(tmp_path / "in", broken("embedding", lambda _: [6e-8] * DIM)(table), 61)
    assert merge_splits(tmp_path / "in", tmp_path / "out", settings()).kept == kept
    write(tmp_path / "in", broken("embedding", lambda _: [0.0] * DIM)(table), 61)
    with pytest.raises(ArtifactError, match="row 3 has a vector of zeros only"):
        merge_splits(tmp_path / "in", tmp_path / "out", settings())


@pytest.mark.parametrize(
    ("table", "provenance", "difference"),
    [
        (images(8, 20), dataclasses.replace(PROVENANCE, model={**MODEL, "revision": "other"}), "origin"),
        (images(8, 20), dataclasses.replace(PROVENANCE, preprocessing="p2"), "origin"),
        (images(8, 20), dataclasses.replace(PROVENANCE, model={**MODEL, "pooling_type": "pooler_output"}), "origin"),
        (images(8, 20), None, "origin"),
        (images(8, 20, dtype="float16"), PROVENANCE, "vector type"),
        (images(8, 20, dim=DIM + 1), PROVENANCE, "vector length"),
    ],
)
def test_inputs_of_different_models_are_refused_by_name(
    shards: Path, tmp_path: Path, table: pa.Table, provenance: Provenance | None, difference: str
) -> None:
    write(shards, table, 8, provenance)
    with pytest.raises(ArtifactError, match="cannot be merged") as caught:
        merge_splits(shards, tmp_path / "merged", settings())
    for part in ("0007_embeddings.parquet", "0008_embeddings.parquet", difference):
        assert part in str(caught.value)


def test_an_image_in_two_files_is_refused(shards: Path, tmp_path: Path) -> None:
    write(shards, images(61, 60), 500)
    with pytest.raises(ArtifactError, match="occurs more than once") as caught:
        merge_splits(shards, tmp_path / "merged", settings())
    assert "0061_embeddings.parquet and" in str(caught.value)


def test_a_data_set_may_lie_in_two_files(tmp_path: Path) -> None:
    table = images(61, 60)
    write(tmp_path / "in", table.slice(0, 50), 1)
    write(tmp_path / "in", table.slice(50), 2)
    write(tmp_path / "whole", table, 61)
    merge_splits(tmp_path / "in", tmp_path / "a", settings())
    merge_splits(tmp_path / "whole", tmp_path / "b", settings())
    assert splits_of(tmp_path / "a") == splits_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("row", "vector", "message"),
    [
        (5, [1.0] * (DIM - 1), "vectors of different lengths"),
        (5, None, r"0061_embeddings\.parquet: row 5 has no embedding"),
        (5, [1.0] * (DIM - 1) + [None], "1 null values"),
        (5, [1.0] * (DIM - 1) + [1e300], "row 5 has a vector with values that are not finite"),
        (0, None, "row 0 has no embedding"),
        (0, [], "row 0 has no embedding"),
    ],
)
def test_lists_that_are_no_vectors_are_refused(tmp_path: Path, row: int, vector: Any, message: str) -> None:
    (tmp_path / "in").mkdir()
    table = foreign(images(61, 40))
    vectors = table["embedding"].to_pylist()
    vectors[row] = vector
    pq.write_table(table.set_column(10, "embedding", pa.array(vectors)), tmp_path / "in" / "0061_embeddings.parquet")
    with pytest.raises(ArtifactError, match=message):
        merge_splits(tmp_path / "in", tmp_path / "out", settings())


def test_an_embedding_column_of_another_kind_is_refused(shards: Path, tmp_path: Path) -> None:
    table = images(62, 60)
    write(shards, replaced(table, "embedding", pa.array(range(len(table)))), 62)
    with pytest.raises(ArtifactError, match="embedding is int64, expected a list of float16, float32 or float64"):
        merge_splits(shards, tmp_path / "merged", settings())


def test_a_file_without_rows_is_no_obstacle(shards: Path, tmp_path: Path) -> None:
    write(shards, images(63, 60).slice(0, 0), 63)
    (tmp_path / "old").mkdir()
    for name, table in (("0001", foreign(images(1, 40)).slice(0, 0)), ("0002", foreign(images(2, 40)))):
        pq.write_table(table, tmp_path / "old" / f"{name}_embeddings.parquet")
    assert merge_splits(shards, tmp_path / "a", settings()).rows
    assert merge_splits(tmp_path / "old", tmp_path / "b", settings()).rows


@pytest.mark.parametrize("missing", ["building_id", "embedding", "target_lat"])
def test_a_missing_column_is_named(shards: Path, tmp_path: Path, missing: str) -> None:
    write(shards, images(62, 60).drop_columns([missing]), 62)
    with pytest.raises(InputError, match=f"0062_embeddings.parquet: missing column {missing}"):
        merge_splits(shards, tmp_path / "merged", settings())


def test_a_flipped_bit_is_found(shards: Path, tmp_path: Path) -> None:
    path = shards / "0062_embeddings.parquet"
    data = bytearray(path.read_bytes())
    chunk = pq.read_metadata(path).row_group(1).column(pq.read_schema(path).get_field_index("embedding"))
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"0062_embeddings\.parquet: damaged page"):
        merge_splits(shards, tmp_path / "merged", settings())
    assert not (tmp_path / "merged").exists()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the embed stage first"):
        merge_splits(tmp_path, tmp_path / "merged", settings())


def test_a_folder_with_other_files_is_never_replaced(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        merge_splits(shards, out, settings())
    with pytest.raises(InputError, match="would be replaced"):
        merge_splits(shards, shards, settings())
    assert (out / "thesis.tex").read_text() == "years of work"
    assert len(list(shards.glob("*.parquet"))) == 3


def test_files_of_others_under_the_same_names_are_not_replaced(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    pq.write_table(pa.table({"label": [1]}), out / "train.parquet")
    with pytest.raises(InputError, match=r"train\.parquet and would be replaced"):
        merge_splits(shards, out, settings())
    assert pq.read_table(out / "train.parquet").to_pylist() == [{"label": 1}]


@pytest.mark.parametrize("lost", ["manifest", "bytes"])
def test_an_earlier_merge_is_replaced(lost: str, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_splits(shards, out, settings())
    if lost == "manifest":
        manifest_path(out).unlink()
    else:
        (out / "train.parquet").write_bytes(b"damaged")
    assert not merge_splits(shards, out, settings(train_ratio=0.6, val_ratio=0.2, test_ratio=0.2)).up_to_date
    verify_artifact(out)


def test_a_second_writer_fails_cleanly(shards: Path, tmp_path: Path) -> None:
    with exclusive(tmp_path / "merged"), pytest.raises(ArtifactBusy):
        merge_splits(shards, tmp_path / "merged", settings())


# What a failure leaves ------------------------------------------------------------------------------------------


def test_a_crash_in_the_copy_leaves_the_old_set_or_nothing(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "merged"
    calls = 0

    def crash(done: int, total: int | None, message: str) -> None:
        nonlocal calls
        calls += done > 0
        if calls == 2:
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        merge_splits(shards, out, settings(batch_size=40), crash)
    assert not out.exists()
    merge_splits(shards, out, settings(batch_size=40))
    whole = bytes_of(out)
    write(shards, images(63, 60), 63)
    calls = 0
    with pytest.raises(RuntimeError, match="on fire"):
        merge_splits(shards, out, settings(batch_size=40), crash)
    assert bytes_of(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["_manifests", "embeddings", "merged"]


def test_an_encoder_that_fails_fails_the_stage(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(StorageFull, match=r"no space left for test\.parquet"):
        merge_splits(shards, tmp_path / "merged", settings())
    assert not (tmp_path / "merged").exists()


def _merge_and_die(shards: Path, out: Path, at: int) -> None:
    seen = 0

    def die(done: int, total: int | None, message: str) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    merge_splits(shards, out, settings(batch_size=40), die)


@pytest.mark.parametrize("at", [1, 4, 7])
def test_kill_9_leaves_no_split_and_the_rerun_is_identical(shards: Path, tmp_path: Path, at: int) -> None:
    out = tmp_path / "merged"
    process = multiprocessing.get_context("spawn").Process(target=_merge_and_die, args=(shards, out, at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    merge_splits(shards, out, settings(batch_size=40))
    merge_splits(shards, tmp_path / "other", settings(batch_size=40))
    assert bytes_of(out) == bytes_of(tmp_path / "other")
    assert not list(tmp_path.glob(".merged.*.partial"))


def test_inputs_that_change_between_the_passes_are_noticed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide = assign_splits

    def swap(*arguments: Any) -> npt.NDArray[np.int8]:
        write(shards, images(62, 90), 62)
        return decide(*arguments)

    monkeypatch.setattr(splits, "assign_splits", swap)
    with pytest.raises(ArtifactError, match="run merge again"):
        merge_splits(shards, tmp_path / "merged", settings())
    assert not (tmp_path / "merged").exists()


# Memory ---------------------------------------------------------------------------------------------------------


def _write_large(path: Path, rows: int, dim: int) -> None:
    """float16 vectors, three images a building, in row groups of 8192 rows."""
    schema = schemas.embeddings(dim, "float16")
    rng = np.random.default_rng(0)
    with parquet_sink(path, schema, PROVENANCE) as writer:
        for start in range(0, rows, 8192):
            patch = np.arange(start, min(rows, start + 8192))
            dataset = np.full(len(patch), 1)
            values: dict[str, Any] = {
                "dataset_id": dataset,
                "target_id": patch // 3,
                "patch_id": patch,
                "building_id": [f"0001_{number}" for number in patch // 3],
                "streetview_image_id": [f"0001_{number}" for number in patch],
                "target_lat": 45 + (patch // 3) * 1e-6,
                "target_lon": 9 + (patch // 3 % 1000) * 1e-5,
                "embedding": vectors_to_arrow(rng.integers(-99, 99, (len(patch), dim)).astype(np.float16)),
            }
            arrays = [
                values[field.name] if field.name in values else pa.array(np.zeros(len(patch), int)).cast(field.type)
                for field in schema
            ]
            writer.write_table(pa.table(arrays, schema=schema))


def _peak_of_merge(directory: Path, out: Path, queue: Any) -> None:
    report: Report = merge_splits(directory, out, settings())
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    queue.put((report.rows, peak / 1024))


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_rows(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for rows in (50_000, 400_000):
        directory, out = tmp_path / f"in{rows}", tmp_path / f"out{rows}"
        _write_large(directory / "0001_embeddings.parquet", rows, 1024)
        queue: Any = context.Queue()
        process = context.Process(target=_peak_of_merge, args=(directory, out, queue))
        process.start()
        kept, peaks[rows] = queue.get(timeout=300)
        process.join()
        assert kept >= rows - 1
        for folder in (directory, out):
            for file in folder.iterdir():
                file.unlink()
    # Eight times the rows, 717 MB more vectors: what may grow is 40 bytes a row and 36 a building.
    assert peaks[400_000] - peaks[50_000] < 90, peaks
    assert peaks[400_000] < 650, peaks
