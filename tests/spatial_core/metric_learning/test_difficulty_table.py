"""Flat arrays of the difficulty table against plain Python over its rows."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from spatial_core import schemas
from spatial_core.errors import ArtifactError, InputError
from spatial_core.geo.sphere import haversine_m, unit_vectors
from spatial_core.metric_learning import difficulty_table
from spatial_core.metric_learning.bandit import BANDS
from spatial_core.metric_learning.difficulty_table import Candidates, chord_of, load_candidates
from spatial_core.storage.parquet import parquet_sink

BOTH = np.array([True, True])
Lines = list[tuple[str, list[str], list[int]]]


def write_table(path: Path, lines: Lines, row_group: int = 7) -> Path:
    with parquet_sink(path, schemas.DIFFICULTY) as writer:
        for begin in range(0, max(len(lines), 1), row_group):
            part = lines[begin : begin + row_group]
            columns = [
                pa.array([line[0] for line in part], pa.string()),
                pa.array([line[1] for line in part], pa.list_(pa.string())),
                pa.array([[0.5] * len(line[1]) for line in part], pa.list_(pa.float64())),
                pa.array([line[2] for line in part], pa.list_(pa.int64())),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schemas.DIFFICULTY))
    return path


def lists_of(candidates: Candidates, image: int) -> list[list[int]]:
    """Buildings of each band of one image."""
    start, offsets = int(candidates.start[image]), candidates.band_offsets[image].tolist()
    return [candidates.building[start + offsets[b] : start + offsets[b + 1]].tolist() for b in range(BANDS)]


@pytest.mark.parametrize("min_distance_m", [0.0, 60.0])
@pytest.mark.parametrize("batch_rows", [5, 100_000])
def test_arrays_hold_what_a_plain_loop_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, min_distance_m: float, batch_rows: int
) -> None:
    monkeypatch.setattr(difficulty_table, "_BATCH_ROWS", batch_rows)
    generator = random.Random(3)
    names = [f"0001_{i}" for i in range(12)]
    places = [(45 + generator.random() / 500, 7 + generator.random() / 500) for _ in names]
    label = [generator.randrange(12) for _ in range(40)]
    image_ids = [f"0001_{900 + i}" for i in range(40)]
    lines: Lines = []
    for image in generator.sample([*image_ids[:35], *(f"0002_{i}" for i in range(20))], 55):
        count = generator.randrange(9)
        neighbours = [generator.choice([*names, "0009_1", "0009_2"]) for _ in range(count)]
        lines.append((image, neighbours, [generator.randrange(BANDS) for _ in range(count)]))
    path = write_table(tmp_path / "difficulty.parquet", lines)

    positions = unit_vectors(*np.array(places).T)
    candidates, counts = load_candidates(
        path,
        pa.array(image_ids),
        pa.array(names),
        np.array(label),
        np.array([label.count(own) > 1 for own in label]),
        positions=positions,
        min_distance_m=min_distance_m,
    )

    told = {image: list(zip(neighbours, bands, strict=True)) for image, neighbours, bands in lines}
    kept = covered = 0
    for image, own in enumerate(label):
        expected: list[list[int]] = [[] for _ in range(BANDS)]
        if label.count(own) > 1:
            for name, band in told.get(image_ids[image], []):
                other = names.index(name) if name in names else own
                if other != own and haversine_m(*map(np.float64, (*places[own], *places[other]))) >= min_distance_m:
                    expected[band].append(other)
        assert lists_of(candidates, image) == expected
        assert int(candidates.available[image]) == sum(1 << band for band in range(BANDS) if expected[band])
        kept += sum(map(len, expected))
        covered += any(expected)
    assert len(candidates.building) == counts.kept == kept
    assert counts.covered == covered
    assert counts.images == sum(label.count(own) > 1 for own in label)
    assert counts.neighbours == counts.kept + counts.elsewhere + counts.own + counts.near
    assert (counts.near > 0) == (min_distance_m > 0)


def test_a_table_about_other_images_leaves_every_anchor_without(tmp_path: Path) -> None:
    path = write_table(tmp_path / "difficulty.parquet", [("0009_1", ["0001_1"], [0])])
    candidates, counts = load_candidates(path, pa.array(["a", "b"]), pa.array(["0001_1"]), np.array([0, 0]), BOTH)
    assert len(candidates.building) == 0
    assert candidates.available.tolist() == [0, 0]
    assert (counts.images, counts.covered, counts.neighbours) == (2, 0, 0)
    empty = write_table(tmp_path / "empty.parquet", [])
    assert load_candidates(empty, pa.array(["a", "b"]), pa.array(["x"]), np.array([0, 0]), BOTH)[1].kept == 0


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        ([("a", ["x", "y"], [0])], "more neighbours than bands"),
        ([("a", ["x"], [7])], "bands from 7 to 7"),
        ([("a", ["x"], [-1])], "bands from -1"),
        ([("a", ["x"], [0]), ("a", ["x"], [0])], "1 images occur more than once"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(tmp_path: Path, lines: Lines, cause: str) -> None:
    path = tmp_path / "difficulty.parquet"
    columns = [[line[i] for line in lines] for i in range(3)]
    pa.parquet.write_table(pa.table(dict(zip(difficulty_table._COLUMNS, columns, strict=True))), path)
    with pytest.raises(ArtifactError, match=cause):
        load_candidates(path, pa.array(["a", "b"]), pa.array(["x", "y"]), np.array([0, 0]), BOTH)


def test_nulls_damage_and_missing_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "difficulty.parquet"
    ids, names, label = pa.array(["a", "b"]), pa.array(["x"]), np.array([0, 0])
    for neighbours, bands in ([[None], [[1]]], [[["x"]], [None]], [[[None]], [[1]]], [[["x"]], [[None]]]):
        table = pa.table(
            [pa.array(["a"]), pa.array(neighbours, pa.list_(pa.string())), pa.array(bands, pa.list_(pa.int64()))],
            names=difficulty_table._COLUMNS,
        )
        pa.parquet.write_table(table, path)
        with pytest.raises(ArtifactError, match="null neighbours or bands"):
            load_candidates(path, ids, names, label, BOTH)
    pa.parquet.write_table(pa.table({"target_coord_hash": ["a"]}), path)
    with pytest.raises(InputError, match="missing column neighbor_building_ids"):
        load_candidates(path, ids, names, label, BOTH)
    write_table(path, [("a", ["x"] * 300, [0] * 300)])
    data = bytearray(path.read_bytes())
    bands = pa.parquet.read_metadata(path).row_group(0).column(3)
    data[(bands.dictionary_page_offset or bands.data_page_offset) + bands.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged page"):
        load_candidates(path, ids, names, label, BOTH)


def test_chords_are_ground_distances() -> None:
    here, there = (45.0, 7.0), (45.0003, 7.0002)
    positions = unit_vectors(*np.array([here, there]).T)
    apart = float(haversine_m(*map(np.float64, (*here, *there))))
    assert float(np.linalg.norm(positions[0] - positions[1])) == pytest.approx(chord_of(apart), rel=1e-7)
