"""Loading of splits: values, labels, sampling, placement, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from spatial_core.errors import ArtifactError, InputError
from spatial_core.geo.sphere import unit_vectors
from spatial_core.metric_learning import features
from spatial_core.metric_learning.checkpoint import Backbone
from spatial_core.metric_learning.features import Sample, load_split, read_backbone
from tests.data.make_training_lake import split_table, write_split

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("budget", [None, 0])
def test_rows_labels_and_places_are_those_of_the_file(tmp_path: Path, dtype: str, budget: int | None) -> None:
    table = split_table(range(15), 1, 12, dtype)
    path = tmp_path / "train.parquet"
    write_split(path, table, row_group=9)
    split = load_split(path, CPU, tmp_path / "scratch", host_budget=budget)
    expected = np.stack(table["embedding"].to_numpy())
    assert split.placed == ("memory" if budget is None else "disk")
    assert split.values.dtype == getattr(torch, dtype)
    assert np.array_equal(split.values.numpy(), expected)
    assert not list(tmp_path.glob("scratch/*")), "the memory-mapped file has no name"
    names = split.building_ids.to_pylist()
    assert names == sorted(set(table["building_id"].to_pylist()))
    assert [names[code] for code in split.label] == table["building_id"].to_pylist()
    assert split.image_ids.to_pylist() == table["streetview_image_id"].to_pylist()
    rows = torch.tensor([3, 0, 3])
    taken = split.take(rows)
    assert taken.dtype == torch.float32
    assert np.array_equal(taken.numpy(), expected[[3, 0, 3]].astype(np.float32))
    assert split.positions is not None
    places = unit_vectors(table["target_lat"].to_numpy(), table["target_lon"].to_numpy())
    assert np.allclose(split.positions[split.label], places, atol=1e-15)


def test_labels_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    table = split_table(range(10), 1, 8)
    shuffled = table.take(pa.array(np.random.default_rng(0).permutation(len(table))))
    write_split(tmp_path / "a.parquet", table)
    write_split(tmp_path / "b.parquet", shuffled)
    one, two = (load_split(tmp_path / f"{n}.parquet", CPU, tmp_path) for n in "ab")
    assert one.building_ids.equals(two.building_ids)


def test_lists_of_doubles_of_the_earlier_pipeline_become_float32(tmp_path: Path) -> None:
    table = split_table(range(6), 1, 8)
    doubles = pa.array([row.astype(float).tolist() for row in table["embedding"].to_numpy()], pa.list_(pa.float64()))
    old = pa.table({"building_id": table["building_id"], "streetview_image_id": table["streetview_image_id"]})
    old = old.append_column("embedding", doubles)
    path = tmp_path / "train.parquet"
    pq.write_table(old, path, row_group_size=5)
    split = load_split(path, CPU, tmp_path)
    assert split.positions is None
    assert np.array_equal(split.values.numpy(), np.stack(table["embedding"].to_numpy()))
    assert read_backbone(path) == Backbone()


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (Sample(fraction=0.5, seed=1), 10),
        (Sample(buildings=7, seed=1), 7),
        (Sample(fraction=0.5, buildings=3, seed=1), 3),
        (Sample(buildings=1000), 20),
        (Sample(fraction=0.001), 2),
        (Sample(), 20),
    ],
)
def test_sampling_takes_whole_buildings_and_repeats(tmp_path: Path, sample: Sample, expected: int) -> None:
    table = split_table(range(20), 1, 8)
    path = tmp_path / "train.parquet"
    write_split(path, table, row_group=11)
    split = load_split(path, CPU, tmp_path, sample)
    names = split.building_ids.to_pylist()
    assert len(names) == expected
    assert (split.rows_in_file, split.buildings_in_file) == (len(table), 20)
    kept = [row for row, name in enumerate(table["building_id"].to_pylist()) if name in names]
    assert split.image_ids.to_pylist() == [table["streetview_image_id"][row].as_py() for row in kept]
    assert [names[code] for code in split.label] == [table["building_id"][row].as_py() for row in kept]
    assert np.array_equal(split.values.numpy(), np.stack(table["embedding"].to_numpy())[kept])
    again = load_split(path, CPU, tmp_path, sample)
    assert again.building_ids.equals(split.building_ids)


def test_other_seeds_choose_other_buildings() -> None:
    chosen = [Sample(buildings=5, seed=seed).choose(50) for seed in range(2)]
    assert [mask.sum() for mask in chosen] == [5, 5]
    assert not np.array_equal(*chosen)


def test_an_empty_split_loads_as_nothing(tmp_path: Path) -> None:
    path = tmp_path / "val.parquet"
    write_split(path, split_table(range(3), 1, 8).slice(0, 0))
    split = load_split(path, CPU, tmp_path)
    assert len(split.label) == 0
    assert not split.can_form_triplets


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda t: with_feature(t, float("nan")), "not finite"),
        (lambda t: with_feature(t, float("inf")), "not finite"),
        (lambda t: replace(t, "embedding", pa.nulls(len(t), pa.list_(pa.float64()))), "null vectors"),
        (lambda t: replace(t, "building_id", pa.nulls(len(t), pa.string())), "without building_id"),
        (lambda t: replace(t, "target_lat", pa.array(np.full(len(t), 91.0))), "nowhere on earth"),
    ],
)
def test_damaged_columns_are_refused(tmp_path: Path, change: object, cause: str) -> None:
    table = change(split_table(range(4), 1, 8))  # type: ignore[operator]
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ArtifactError, match=rf"train\.parquet.*{cause}"):
        load_split(tmp_path / "train.parquet", CPU, tmp_path)


def replace(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)


def with_feature(table: pa.Table, value: float) -> pa.Table:
    matrix = np.stack(table["embedding"].to_numpy()).copy()
    matrix[5, 3] = value
    return replace(table, "embedding", pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), 8))


def test_missing_columns_and_full_disks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.parquet"
    table = split_table(range(4), 1, 8)
    write_split(path, table.drop_columns(["streetview_image_id"]))
    with pytest.raises(InputError, match="missing column streetview_image_id"):
        load_split(path, CPU, tmp_path)
    write_split(path, table)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"no room for .* GB of features \(No space left"):
        load_split(path, CPU, tmp_path / "scratch", host_budget=0)
    assert not list(tmp_path.glob("scratch/*"))


def test_the_backbone_is_read_from_the_footer(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    write_split(path, split_table(range(3), 1, 8), {"id": "m", "revision": "r"})
    assert read_backbone(path) == Backbone({"id": "m", "revision": "r"}, "test-224")
