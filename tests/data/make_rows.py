"""Writes intermediates and rejects from rows that name only what matters to a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from spatial_core import schemas
from spatial_core.storage.parquet import parquet_sink


def intermediates(path: Path, dataset_id: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """`NNNN.parquet`; what a row does not name is a plausible constant, ids follow from its numbers."""
    columns: dict[str, list[Any]] = {field.name: [] for field in schemas.INTERMEDIATES}
    for row in rows:
        full = {
            "dataset_id": dataset_id,
            "street_view_id": 7,
            "target_lat": 45.0,
            "target_lon": 9.0,
            "building_id": f"{dataset_id:04d}_{row['target_id']}",
            "streetview_image_id": f"{dataset_id:04d}_{row['patch_id']}",
            "image_path": f"{row['patch_id']}.jpg",
            "tar_file": f"{dataset_id:04d}.tar",
            "image_offset": 512,
            "image_width": 64,
            "image_height": 64,
            **row,
        }
        for name, values in columns.items():
            values.append(full[name])
    _write(path, schemas.INTERMEDIATES, columns)


def rejects(path: Path, key: str, reasons: Mapping[str, int]) -> None:
    """`NNNN_rejects.parquet` with so many members a reason."""
    listed = [reason for reason, count in reasons.items() for _ in range(count)]
    columns: dict[str, list[Any]] = {
        "tar_file": [f"{key}.tar"] * len(listed),
        "member_path": [f"{number}.txt" for number in range(len(listed))],
        "member_offset": [512 * number for number in range(len(listed))],
        "member_bytes": [0] * len(listed),
        "reason": listed,
        "detail": [""] * len(listed),
    }
    _write(path, schemas.REJECTS, columns)


def _write(path: Path, schema: pa.Schema, columns: Mapping[str, list[Any]]) -> None:
    with parquet_sink(path, schema) as sink:
        sink.write_table(pa.table(dict(columns), schema=schema))
