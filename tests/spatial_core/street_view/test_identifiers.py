"""Ids: composed as the data set writes them, refused when text and numbers disagree."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from spatial_core.errors import ArtifactError
from spatial_core.street_view.identifiers import checked_ids, compose_ids


def batch(**changes: Any) -> pa.RecordBatch:
    columns: dict[str, Any] = {
        "dataset_id": [61, 61],
        "target_id": [5, 1234567890123],
        "patch_id": [7, 8],
        "building_id": ["0061_5", "0061_1234567890123"],
        "streetview_image_id": ["0061_7", "0061_8"],
    }
    return pa.RecordBatch.from_pydict({**columns, **changes})


def test_ids_are_padded_to_four_digits_and_no_further() -> None:
    composed = compose_ids(pa.array([1, 61, 12345]), pa.array([2, 3, 4]))
    assert composed.to_pylist() == ["0001_2", "0061_3", "12345_4"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dataset_id": pa.array([61, 61], pa.int16())},
        {"building_id": pa.array(["0061_5", "0061_1234567890123"], pa.large_string())},
        {"streetview_image_id": pa.array(["0061_7", "0061_8"]).dictionary_encode()},
    ],
)
def test_every_layout_of_good_ids_is_read(changes: dict[str, Any]) -> None:
    checked = checked_ids(batch(**changes), "file", 0)
    assert checked.to_pydict() == batch().to_pydict()
    assert checked.schema.field("dataset_id").type == pa.int64()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"building_id": ["0061_5", "61_1234567890123"]}, "row 11 has building_id '61_1234567890123'"),
        ({"building_id": ["0062_5", "0061_1234567890123"]}, "row 10 has building_id '0062_5'"),
        ({"streetview_image_id": ["0061_7", "0061_9"]}, "make '0061_8'"),
        ({"streetview_image_id": ["0061_7", None]}, "row 11 has no streetview_image_id"),
        ({"dataset_id": pa.array([None, 61])}, "row 10 has no dataset_id"),
        ({"dataset_id": [61.0, 61.0]}, "dataset_id is double"),
        ({"building_id": [5, 6]}, "building_id is int64"),
        ({"target_id": [5, -3], "building_id": ["0061_5", "0061_-3"]}, "row 11 has target_id -3"),
        ({"patch_id": pa.array([7, 2**64 - 1], pa.uint64())}, "does not fit 64 bits"),
    ],
)
def test_malformed_ids_name_file_row_and_cause(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=r"the\.parquet") as caught:
        checked_ids(batch(**changes), "the.parquet", 10)
    assert message in str(caught.value)
