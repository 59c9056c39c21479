"""Checks: a sound artifact passes, and each planted fault is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError
from spatial_core.quality import checks
from spatial_core.storage.parquet import parquet_sink, vectors_to_arrow

SETTINGS = Settings()


def rows(count: int, tar: int = 901, first: int = 0, views: int = 2) -> dict[str, list[Any]]:
    """Identity, source, geometry and image columns of `count` sound images, `views` a building."""
    numbers = range(first, first + count)
    table: dict[str, list[Any]] = {
        "dataset_id": [tar] * count,
        "target_id": [number // views for number in numbers],
        "patch_id": list(numbers),
        "street_view_id": list(numbers),
        "target_lat": [52.0] * count,
        "target_lon": [13.0] * count,
        "building_id": [f"{tar:04d}_{number // views}" for number in numbers],
        "streetview_image_id": [f"{tar:04d}_{number}" for number in numbers],
        "image_path": [f"{number}.jpg" for number in numbers],
        "tar_file": [f"{tar:04d}.tar"] * count,
        **{field.name: [1.0] * count for field in schemas.GEOMETRY},
        "image_offset": [512] * count,
        "image_bytes": [99] * count,
        "image_width": [640] * count,
        "image_height": [640] * count,
        "image_sha256": ["ab"] * count,
    }
    return table


def write(path: Path, schema: pa.Schema, table: dict[str, Any]) -> Path:
    with parquet_sink(path, schema) as sink:
        columns = [
            value if isinstance(value, pa.Array) else pa.array(value, schema.field(name).type)
            for name, value in ((name, table[name]) for name in schema.names)
        ]
        sink.write_table(pa.table(columns, schema=schema))
    return path


def vectors(count: int, dim: int = 4) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, dim)).astype(np.float32)


def intermediates(
    folder: Path, change: dict[str, list[Any]] | None = None, rejects: int = 0, reason: str = "metadata_empty"
) -> Path:
    table = {**rows(4), **(change or {})}
    path = write(folder / "0901.parquet", schemas.INTERMEDIATES, table)
    rejected = {
        "tar_file": ["0901.tar"] * rejects,
        "member_path": ["x.txt"] * rejects,
        "member_offset": list(range(rejects)),
        "member_bytes": [0] * rejects,
        "reason": [reason] * rejects,
        "detail": [""] * rejects,
    }
    write(folder / "0901_rejects.parquet", schemas.REJECTS, rejected)
    return path


@pytest.mark.parametrize(
    ("change", "rejects", "fault"),
    [
        ({}, 8, ""),
        ({}, 9, "9 of 17 files rejected"),
        ({"streetview_image_id": ["a", "a", "b", "c"]}, 0, "1 duplicate image ids"),
        ({"target_lat": [91.0, 0, 0, 0]}, 0, "1 targets with impossible coordinates"),
        ({"image_offset": [0, 512, 512, 512]}, 0, "1 images without a place"),
    ],
)
def test_intermediates(tmp_path: Path, change: dict[str, list[Any]], rejects: int, fault: str) -> None:
    outcome = checks.intermediates_sound(intermediates(tmp_path, change, rejects), SETTINGS)
    assert outcome.passed == (not fault)
    assert fault in outcome.summary


def test_folder_entries_are_no_sign_of_a_bad_tar(tmp_path: Path) -> None:
    outcome = checks.intermediates_sound(intermediates(tmp_path, rejects=99, reason=schemas.FOLDER_REASON), SETTINGS)
    assert outcome.passed
    assert (outcome.figures["rejected"], outcome.figures["folders"], outcome.figures["members"]) == (0, 99, 107)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.schema([pa.field("building_id", pa.int64())]), {"building_id": [1]})
    with pytest.raises(ArtifactError, match="no column dataset_id"):
        checks.embeddings_sound(path)


@pytest.mark.parametrize(
    ("plant", "fault"), [(None, ""), (np.nan, "1 vectors are not finite"), (0.0, "1 vectors are all zero")]
)
def test_embeddings(tmp_path: Path, plant: float | None, fault: str) -> None:
    matrix = vectors(4)
    if plant is not None:
        matrix[2] = plant
    table = {**rows(4), "embedding": vectors_to_arrow(matrix)}
    outcome = checks.embeddings_sound(write(tmp_path / "a.parquet", schemas.embeddings(4, "float32"), table))
    assert outcome.passed == (not fault)
    assert fault in outcome.summary


@pytest.mark.parametrize("black", [False, True])
def test_fingerprints(tmp_path: Path, black: bool) -> None:
    matrix = np.full((4, 12), 9, np.uint8)
    matrix[1] = 0 if black else 1
    table = {**rows(4), "fingerprint": vectors_to_arrow(matrix)}
    outcome = checks.fingerprints_sound(write(tmp_path / "a.parquet", schemas.fingerprints(2), table))
    assert outcome.passed != black


def splits(folder: Path, sizes: tuple[int, int, int] = (70, 15, 15), change: dict[str, Any] | None = None) -> Path:
    first = 0
    for split, buildings in zip(checks.SPLITS, sizes, strict=True):
        count = 2 * buildings
        table = {**rows(count, first=first), "embedding": vectors_to_arrow(vectors(count))}
        if change and split == "test":
            table.update({name: [*table[name][:-1], value] for name, value in change.items()})
        write(folder / f"{split}.parquet", schemas.splits(4, "float32"), table)
        first += count
    return folder


@pytest.mark.parametrize(
    ("sizes", "change", "fault"),
    [
        ((70, 15, 15), None, ""),
        ((70, 15, 15), {"building_id": "0901_0"}, "1 buildings are in more than one split"),
        ((70, 15, 15), {"building_id": "0901_777"}, "2 buildings have a single image"),
        ((70, 15, 15), {"streetview_image_id": "0901_0"}, "1 images occur twice"),
        ((10, 45, 45), None, "train holds 10.0% of buildings"),
        ((0, 50, 50), None, "the train split has no buildings"),
    ],
)
def test_splits(tmp_path: Path, sizes: tuple[int, int, int], change: dict[str, Any] | None, fault: str) -> None:
    outcome = checks.splits_sound(splits(tmp_path, sizes, change), SETTINGS)
    assert outcome.passed == (not fault)
    assert fault in outcome.summary


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ""),
        ({"neighbor_bands": [[0, 6], [7, 1], []]}, "1 anchors have bands outside 0-6"),
        ({"neighbor_distances_meters": [[2.0, 1.0], [1.0, 2.0], []]}, "1 anchors have neighbours out of order"),
        ({"neighbor_bands": [[0], [1, 1], []]}, "1 anchors have lists of different lengths"),
        ({"target_coord_hash": ["0901_0", "0901_0", "0901_2"]}, "1 duplicate anchors"),
    ],
)
def test_difficulty(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    table = {
        "target_coord_hash": ["0901_0", "0901_1", "0901_2"],
        "neighbor_building_ids": [["x", "y"], ["x", "y"], []],
        "neighbor_distances_meters": [[1.0, 2.0], [1.0, 2.0], []],
        "neighbor_bands": [[0, 6], [1, 1], []],
        **change,
    }
    path = write(tmp_path / "difficulty.parquet", schemas.DIFFICULTY, table)
    outcome = checks.difficulty_sound(path)
    assert outcome.passed == (not fault)
    assert fault in outcome.summary
    covered = checks.difficulty_sound(path, splits(tmp_path / "merged"))
    assert "training images have no difficulty" in covered.summary


@pytest.mark.parametrize(("scale", "passes"), [(1.0, True), (1.01, False)])
def test_new_vectors_are_of_unit_length(tmp_path: Path, scale: float, passes: bool) -> None:
    matrix = vectors(5, 256)
    matrix *= scale / np.linalg.norm(matrix, axis=1, keepdims=True)
    schema = schemas.final_embeddings(pa.string())
    write(
        tmp_path / "parts" / "rg00000_rb00000.parquet",
        schema,
        {"OSMID": list("abcde"), "embedding": vectors_to_arrow(matrix)},
    )
    assert checks.vectors_sound(tmp_path).passed == passes


def test_buildings_occur_once(tmp_path: Path) -> None:
    matrix = vectors(3, 256)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    table = {"embedding": vectors_to_arrow(matrix), "images": [1, 1, 1], "coherence": [1.0, 1.0, 1.0]}
    schema = schemas.building_embeddings(pa.string())
    once = write(tmp_path / "once.parquet", schema, {"OSMID": ["a", "b", None], **table})
    twice = write(tmp_path / "twice.parquet", schema, {"OSMID": ["a", "b", "a"], **table})
    assert checks.buildings_sound(once).passed
    assert "1 OSMIDs occur more than once" in checks.buildings_sound(twice).summary
