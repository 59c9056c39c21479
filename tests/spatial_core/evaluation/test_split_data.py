"""Splits as they come: ours, the earlier pipeline's, and damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from spatial_core.errors import ArtifactError, InputError
from spatial_core.evaluation import split_data
from spatial_core.evaluation.split_data import feature_batches, read_split


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_everything_is_read_in_batches_of_any_size(
    make_lake: Callable[..., object], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = make_lake({"train": 4, "test": 30}, dtype=dtype, pictures=False)
    path = lake.merged / "test.parquet"
    whole = read_split(path, "test")
    monkeypatch.setattr(split_data, "_BATCH_BYTES", 8 * 48 * 7)
    assert sum(1 for _ in feature_batches(path)) > 5
    split = read_split(path, "test")
    table = pq.read_table(path)
    assert split.features.dtype == getattr(torch, dtype)
    assert torch.equal(split.features, whole.features)
    assert split.features.tolist() == table.column("embedding").to_pylist()
    assert [split.buildings[int(label)].as_py() for label in split.labels] == table.column("building_id").to_pylist()
    assert split.images.to_pylist() == table.column("streetview_image_id").to_pylist()
    assert split.datasets.tolist() == table.column("dataset_id").to_pylist()


def test_cameras_lie_where_distance_says(make_lake: Callable[..., object]) -> None:
    split = read_split(make_lake({"train": 0, "test": 20}, pictures=False).merged / "test.parquet", "test")
    assert split.camera is not None and split.distance_m is not None
    np.testing.assert_allclose(np.hypot(*split.camera.T), split.distance_m, rtol=1e-6)


def test_a_camera_across_the_date_line_is_near() -> None:
    columns = {"target_lat": [0.0], "target_lon": [179.9999], "street_view_lat": [0.0], "street_view_lon": [-179.9999]}
    np.testing.assert_allclose(split_data._camera(pa.table(columns)), [[22.264, 0.0]], atol=1e-3)


def test_the_earlier_pipelines_splits_are_read(tmp_path: Path) -> None:
    path = tmp_path / "val.parquet"
    vectors = [[0.25, 1.5], [2.0, -1.0], [0.0, 3.0]]
    pq.write_table(
        pa.table(
            {
                "dataset_id": [7, 7, 7],
                "building_id": ["0007_1", "0007_2", "0007_1"],
                "streetview_image_id": ["a", "b", "c"],
                "embedding": pa.array(vectors, pa.list_(pa.float64())),
            }
        ),
        path,
    )
    split = read_split(path, "val")
    assert split.features.dtype == torch.float32
    assert split.features.tolist() == vectors
    assert split.labels.tolist() == [0, 1, 0]
    assert split.camera is None and split.distance_m is None


def test_a_split_without_rows(make_lake: Callable[..., object]) -> None:
    split = read_split(make_lake({"train": 3, "test": 0}, pictures=False).merged / "test.parquet", "test")
    assert len(split) == 0 and split.features.shape == (0, 48)


def test_faults_name_the_file(make_lake: Callable[..., object], tmp_path: Path) -> None:
    path = make_lake({"train": 3, "test": 9}, pictures=False).merged / "test.parquet"
    table = pq.read_table(path)
    broken = tmp_path / "test.parquet"
    pq.write_table(table.drop_columns("building_id"), broken)
    with pytest.raises(InputError, match=r"test\.parquet: missing column building_id"):
        read_split(broken, "test")
    for column in ("building_id", "embedding"):
        entry = table.schema.field(column)
        values = [None, *table.column(column).to_pylist()[1:]]
        place = table.schema.names.index(column)
        pq.write_table(table.set_column(place, column, pa.array(values, entry.type)), broken)
        with pytest.raises(ArtifactError, match=r"test\.parquet: .*(null values in building_id|index 1 had size=0)"):
            read_split(broken, "test")
    ragged = pa.array([[1.0], *[[1.0, 2.0]] * (len(table) - 1)], pa.list_(pa.float64()))
    pq.write_table(table.set_column(table.schema.names.index("embedding"), "embedding", ragged), broken)
    with pytest.raises(ArtifactError, match=r"test\.parquet: vectors of different lengths"):
        read_split(broken, "test")


def test_a_flipped_bit_is_noticed(make_lake: Callable[..., object]) -> None:
    path = make_lake({"train": 3, "test": 40}, pictures=False).merged / "test.parquet"
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0)
    chunk = next(column.column(i) for i in range(column.num_columns) if "embedding" in column.column(i).path_in_schema)
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"test\.parquet: damaged page"):
        read_split(path, "test")
