"""Stage difficulty against the earlier pipeline's description in plain loops, and on files it must refuse."""

from __future__ import annotations

import bisect
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import PCA
from sklearn.neighbors import BallTree

from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError, InputError, ModelError
from spatial_core.geo.sphere import haversine_m
from spatial_core.storage.digests import sha256_file
from spatial_core.storage.parquet import parquet_sink, read_provenance, vectors_to_arrow, vectors_to_numpy
from spatial_core.storage.provenance import Provenance, verify_artifact
from spatial_core.street_view import bands, difficulty
from spatial_core.street_view.difficulty import compute_difficulty
from spatial_core.street_view.fingerprints import fingerprint_tar
from spatial_core.street_view.ingest import ingest_tar

SIDE = 4
DIM = SIDE * SIDE * 3
PROVENANCE = Provenance("fingerprint", "1", "0" * 64, {"fingerprints": {"image_size": SIDE, "decode": "exact"}})


def settings(infrastructure: dict[str, Any] | None = None, **data: Any) -> Settings:
    return Settings.model_validate(
        {"data": {"pca_components": 12, **data}, "infrastructure": {"device": "cpu", **(infrastructure or {})}}
    )


def images(dataset: int, count: int, *, buildings: int = 30, spread_m: float = 2000) -> pa.Table:
    """Fingerprints of a few looks, each building in its own place."""
    rng = np.random.default_rng(dataset)
    looks = np.random.default_rng(0).integers(40, 216, (15, DIM))
    building = rng.integers(0, buildings, count)
    pixels = np.clip(looks[building % 15] + rng.normal(0, 25, (count, DIM)), 0, 255).astype(np.uint8)
    place = rng.uniform(0, spread_m / 111_195, (buildings, 2))
    columns: dict[str, Any] = {
        "dataset_id": np.full(count, dataset),
        "target_id": building,
        "patch_id": np.arange(count),
        "street_view_id": np.arange(count),
        "target_lat": 0.5 + place[building, 0],
        "target_lon": 9 + place[building, 1],
        "building_id": [f"{dataset:04d}_{number}" for number in building],
        "streetview_image_id": [f"{dataset:04d}_{number}" for number in range(count)],
        "fingerprint": vectors_to_arrow(pixels),
    }
    schema = schemas.fingerprints(SIDE)
    for field in schema:
        if field.name not in columns:
            text = pa.types.is_string(field.type)
            columns[field.name] = pa.array(["x"] * count) if text else pa.array(np.zeros(count)).cast(field.type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def write(directory: Path, table: pa.Table, dataset: int, provenance: Provenance | None = PROVENANCE) -> Path:
    path = directory / f"{dataset:04d}_fingerprints.parquet"
    with parquet_sink(path, table.schema, provenance) as writer:
        writer.write_table(table, row_group_size=100)
    return path


def foreign(table: pa.Table) -> pa.Table:
    """As the earlier pipeline wrote it: intermediate columns and list<int64>."""
    names = [*(field.name for field in schemas.IDENTITY), "image_path", "tar_file"]
    pixels = pa.array(vectors_to_numpy(table["fingerprint"]).astype(np.int64).tolist(), pa.list_(pa.int64()))
    return pa.table([*(table.column(name) for name in names), pixels], names=[*names, "fingerprint"])


Row = tuple[str, list[str], list[float], list[int]]


def reference(
    tables: list[pa.Table], *, components: int, neighbors: int, k0: int, seed: int, min_m: float
) -> tuple[list[Row], list[float]]:
    """The earlier pipeline's method, image by image, with the minimum ground distance applied to all other images."""
    table = pa.concat_tables(tables)
    pixels = np.array(table["fingerprint"].to_pylist(), np.float32) / np.float32(255)
    names, buildings = table["streetview_image_id"].to_pylist(), table["building_id"].to_pylist()
    lat, lon = table["target_lat"].to_numpy(), table["target_lon"].to_numpy()
    scores = PCA(min(components, *pixels.shape), random_state=seed).fit_transform(pixels)
    k = min(len(names), neighbors + 50) if not min_m else len(names)
    tree_distances, tree_rows = BallTree(scores).query(scores, k=k)
    kept: list[list[tuple[float, int]]] = []
    scales = []
    for i in range(len(names)):
        found = [
            (float(distance), int(row))
            for distance, row in zip(tree_distances[i], tree_rows[i], strict=True)
            if buildings[row] != buildings[i] and float(haversine_m(lat[i], lon[i], lat[row], lon[row])) >= min_m
        ][:neighbors]
        kept.append(found)
        values = [distance for distance, _ in found]
        scale = values[min(k0, len(values)) - 1] if values else 1.0
        scales.append(scale if scale > 0 else next((value for value in values if value > 0), 1.0))
    count = len(names)
    chosen = np.random.default_rng(seed).choice(
        count, min(count, max(int(np.ceil(0.03 * count)), 10_000)), replace=False
    )
    pooled = [distance / scales[i] for i in chosen for distance, _ in kept[i]]
    edges = np.percentile(pooled, [5, 10, 20, 40, 60, 85]).tolist() if pooled else []
    rows = [
        (
            names[i],
            [buildings[row] for _, row in kept[i]],
            [distance for distance, _ in kept[i]],
            [bisect.bisect_right(edges, distance / scales[i]) for distance, _ in kept[i]],
        )
        for i in range(count)
    ]
    return rows, edges


def assert_same(path: Path, expected: list[Row], edges: list[float]) -> None:
    """Equal up to rounding: neighbours may swap, and bands differ, only where distances or edges tie."""
    table = pq.read_table(path)
    found_edges = json.loads(table.schema.metadata[b"band_edges"])
    assert found_edges == pytest.approx(edges, rel=1e-4)
    assert table["target_coord_hash"].to_pylist() == [row[0] for row in expected]
    other = total = 0
    for i, (_, buildings, distances, band) in enumerate(expected):
        assert table["neighbor_distances_meters"][i].as_py() == pytest.approx(distances, rel=2e-4, abs=2e-4)
        mine = table["neighbor_building_ids"][i].as_py()
        # Compare within runs of distances that rounding cannot tell apart.
        other += sum(a != b for a, b in zip(mine, buildings, strict=True))
        other += sum(a != b for a, b in zip(table["neighbor_bands"][i].as_py(), band, strict=True))
        total += 2 * len(buildings)
    assert other <= 0.004 * total, (other, total)


@pytest.mark.parametrize("min_m", [0.0, 150.0])
@pytest.mark.parametrize(
    ("sizes", "neighbors", "k0"),
    [((60,), 150, 50), ((150, 150), 40, 10), ((300, 1, 400), 25, 24), ((3,), 5, 2), ((1,), 5, 2)],
)
def test_agrees_with_the_earlier_pipeline(
    tmp_path: Path, sizes: tuple[int, ...], neighbors: int, k0: int, min_m: float
) -> None:
    tables = [images(dataset + 1, size) for dataset, size in enumerate(sizes)]
    for dataset, table in enumerate(tables):
        write(tmp_path / "in", table, dataset + 1)
    chosen = settings(neighbors=neighbors, k0_for_local_scale=k0, min_negative_distance_m=min_m)
    report = compute_difficulty(tmp_path / "in", tmp_path / "out.parquet", chosen)
    expected, edges = reference(tables, components=12, neighbors=neighbors, k0=k0, seed=42, min_m=min_m)
    assert_same(tmp_path / "out.parquet", expected, edges)
    assert report.rows == report.rows_in == report.kept == sum(sizes)
    assert report.details["images_with_fewer_neighbours"] == sum(len(row[1]) < neighbors for row in expected)
    assert report.details["images_without_neighbours"] == sum(not row[1] for row in expected)
    assert report.details["neighbours"] == sum(report.details["band_counts"]) == sum(len(row[1]) for row in expected)
    assert (report.details["excluded_near"] > 0) == (min_m > 0 and max(sizes) > 5)


def test_file_is_what_the_contract_says(tmp_path: Path) -> None:
    write(tmp_path / "in", images(1, 300), 1)
    out = tmp_path / "difficulty" / "difficulty_metadata.parquet"
    report = compute_difficulty(
        tmp_path / "in", out, settings({"row_group_size": 90}, neighbors=20, k0_for_local_scale=5)
    )
    assert pq.read_schema(out).equals(schemas.DIFFICULTY)
    metadata = {key.decode(): value.decode() for key, value in pq.read_metadata(out).metadata.items()}
    assert metadata["neighbors"] == "20"
    assert metadata["k0_for_local_scale"] == "5"
    assert metadata["sample_fraction_for_bands"] == "0.03"
    assert metadata["distance_metric"] == "euclidean_visual"
    assert metadata["pca_components"] == "12"
    assert metadata["min_negative_distance_m"] == "30"
    assert metadata["search_method"] == "exact"
    assert metadata["search_recall"] == "1.0"
    assert len(json.loads(metadata["band_edges"])) == 6
    assert int(metadata["excluded_near"]) == report.details["excluded_near"]
    file = pq.read_metadata(out)
    assert [file.row_group(i).num_rows for i in range(file.num_row_groups)] == [90, 90, 90, 30]
    provenance = read_provenance(out)
    assert provenance is not None
    assert provenance.inputs == {
        "0001_fingerprints.parquet": sha256_file(tmp_path / "in" / "0001_fingerprints.parquet")
    }
    verify_artifact(out)


def test_lists_kept_from_calibration_or_searched_again_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dataset in (1, 2):
        write(tmp_path / "in", images(dataset, 250), dataset)
    chosen = settings(neighbors=20, k0_for_local_scale=5)
    monkeypatch.setattr(bands, "MIN_CALIBRATION_ANCHORS", 100)
    compute_difficulty(tmp_path / "in", tmp_path / "a.parquet", chosen)
    monkeypatch.setattr(difficulty, "_HELD_ENTRIES", 0)
    monkeypatch.setattr(difficulty, "_BLOCK_ANCHORS", 64)
    compute_difficulty(tmp_path / "in", tmp_path / "b.parquet", chosen)
    assert sha256_file(tmp_path / "a.parquet") == sha256_file(tmp_path / "b.parquet")


def test_every_row_of_the_batches_keeps_its_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small batches everywhere, blocks of seven anchors: the same file.
    for dataset in (1, 2):
        write(tmp_path / "in", images(dataset, 150), dataset)
    compute_difficulty(tmp_path / "in", tmp_path / "a.parquet", settings(neighbors=20, k0_for_local_scale=5))
    monkeypatch.setattr("spatial_core.street_view.fingerprint_files._BATCH_ROWS", 37)
    small = settings({"batch_size": 7, "threads": 1}, neighbors=20, k0_for_local_scale=5)
    compute_difficulty(tmp_path / "in", tmp_path / "b.parquet", small)
    assert pq.read_table(tmp_path / "a.parquet").equals(pq.read_table(tmp_path / "b.parquet"))


def test_float64_distances_are_those_of_float64_arithmetic(tmp_path: Path) -> None:
    table = images(1, 600)
    write(tmp_path / "in", table, 1)
    for dtype in ("float32", "float64"):
        chosen = settings({"distance_dtype": dtype}, neighbors=20, k0_for_local_scale=5)
        compute_difficulty(tmp_path / "in", tmp_path / f"{dtype}.parquet", chosen)
    narrow, wide = (
        np.array(pq.read_table(tmp_path / f"{dtype}.parquet")["neighbor_distances_meters"].to_pylist())
        for dtype in ("float32", "float64")
    )
    assert np.array_equal(narrow, narrow.astype(np.float32))
    assert not np.array_equal(wide, wide.astype(np.float32))
    assert wide == pytest.approx(narrow, rel=1e-6)


def test_files_of_the_earlier_pipeline_give_the_same_table(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for dataset in (1, 2):
        table = images(dataset, 150)
        write(tmp_path / "new", table, dataset)
        pq.write_table(foreign(table), tmp_path / "old" / f"{dataset:04d}_fingerprints.parquet")
    for name in ("new", "old"):
        compute_difficulty(tmp_path / name, tmp_path / f"{name}.parquet", settings())
    assert pq.read_table(tmp_path / "new.parquet").equals(pq.read_table(tmp_path / "old.parquet"))


def test_only_ids_and_pixels_are_needed_without_a_minimum_distance(tmp_path: Path) -> None:
    table = images(1, 100)
    write(tmp_path / "bare", table.select(["building_id", "streetview_image_id", "fingerprint"]), 1)
    off = settings(min_negative_distance_m=0)
    assert compute_difficulty(tmp_path / "bare", tmp_path / "a.parquet", off).rows == 100
    with pytest.raises(InputError, match="missing column target_lat, target_lon"):
        compute_difficulty(tmp_path / "bare", tmp_path / "b.parquet", settings())


def test_approximate_search_finds_nearly_all_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dataset in (1, 2):
        write(tmp_path / "in", images(dataset, 1500, buildings=300), dataset)
    few: dict[str, Any] = {"neighbors": 20, "k0_for_local_scale": 5}
    compute_difficulty(tmp_path / "in", tmp_path / "exact.parquet", settings(**few))
    compute_difficulty(tmp_path / "in", tmp_path / "near.parquet", settings(**few, search_exact_rows=1000))
    metadata = pq.read_schema(tmp_path / "near.parquet").metadata
    assert metadata[b"search_method"].startswith(b"ivf_flat groups=219 probes=")
    assert float(metadata[b"search_recall"]) >= 0.98
    exact, near = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("exact", "near"))
    worse = np.array(near["neighbor_distances_meters"].to_pylist()) > np.array(
        exact["neighbor_distances_meters"].to_pylist()
    )
    assert worse.mean() < 0.05
    forced = settings(**few, search="approximate")
    assert "ivf" in compute_difficulty(tmp_path / "in", tmp_path / "f.parquet", forced).details["search_method"]
    exact_again = settings(**few, search="exact", search_exact_rows=10)
    assert compute_difficulty(tmp_path / "in", tmp_path / "e.parquet", exact_again).details["search_method"] == "exact"


def test_a_second_run_does_nothing_and_a_changed_input_does(tmp_path: Path) -> None:
    write(tmp_path / "in", images(1, 100), 1)
    out = tmp_path / "out.parquet"
    first = compute_difficulty(tmp_path / "in", out, settings())
    assert not first.up_to_date
    assert compute_difficulty(tmp_path / "in", out, settings()).up_to_date
    write(tmp_path / "in", images(2, 50), 2)
    assert compute_difficulty(tmp_path / "in", out, settings()).rows == 150


def test_blank_fingerprints_are_reported(tmp_path: Path) -> None:
    table = images(1, 100)
    pixels = vectors_to_numpy(table["fingerprint"]).copy()
    pixels[[4, 9]] = 0
    at = table.schema.get_field_index("fingerprint")
    write(tmp_path / "in", table.set_column(at, table.schema.field(at), vectors_to_arrow(pixels)), 1)
    assert compute_difficulty(tmp_path / "in", tmp_path / "o.parquet", settings()).details["blank_fingerprints"] == 2


# What must be refused -------------------------------------------------------------------------------------------


def changed(name: str, values: Callable[[pa.Table], Any]) -> Callable[[pa.Table], pa.Table]:
    def make(table: pa.Table) -> pa.Table:
        array = values(table)
        array = array if isinstance(array, pa.Array) else pa.array(array)
        return table.set_column(table.schema.get_field_index(name), name, array)

    return make


def texts(name: str, at: int, value: str | None) -> Callable[[pa.Table], pa.Table]:
    return changed(name, lambda table: [value if i == at else text for i, text in enumerate(table[name].to_pylist())])


def pixels_at(at: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    return changed(
        "fingerprint",
        lambda table: [value if i == at else list(row) for i, row in enumerate(table["fingerprint"].to_pylist())],
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (texts("streetview_image_id", 5, None), "row 5 has no streetview_image_id"),
        (texts("building_id", 5, None), "row 5 has no building_id"),
        (texts("building_id", 5, "0001_x"), "row 5 has building_id '0001_x'"),
        (lambda table: pa.concat_tables([table, table.slice(7, 1)]), "streetview_image_id 0001_7 occurs 2 times"),
        (changed("target_lat", lambda table: [100.0] * len(table)), "row 0 has target_lat 100.0"),
        (pixels_at(5, None), "1 null vectors"),
        (pixels_at(5, [1, 2]), "vectors of different lengths"),
        (pixels_at(5, [256] * DIM), "values outside 0 to 255"),
        (pixels_at(5, [-1] * DIM), "values outside 0 to 255"),
        (pixels_at(0, []), "row 0 has no fingerprint"),
        (changed("fingerprint", lambda table: list(range(len(table)))), "fingerprint is int64"),
        (
            changed("fingerprint", lambda table: pa.array([[0.5]] * len(table))),
            "fingerprint is list<element: double>, expected a list of integers",
        ),
    ],
)
def test_a_bad_file_is_refused_and_nothing_is_published(tmp_path: Path, make: Any, message: str) -> None:
    write(tmp_path / "in", make(images(1, 80)), 1)
    with pytest.raises(ArtifactError) as caught:
        compute_difficulty(tmp_path / "in", tmp_path / "out.parquet", settings())
    assert message in str(caught.value)
    assert not (tmp_path / "out.parquet").exists()


def test_an_image_in_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in", images(1, 80), 1)
    write(tmp_path / "in", images(1, 80).slice(79), 2)
    with pytest.raises(ArtifactError, match="0001_79 occurs 2 times"):
        compute_difficulty(tmp_path / "in", tmp_path / "out.parquet", settings())


@pytest.mark.parametrize("other", [None, Provenance("fingerprint", "1", "0", {"fingerprints": {"decode": "scaled"}})])
def test_fingerprints_made_differently_are_refused_by_name(tmp_path: Path, other: Provenance | None) -> None:
    write(tmp_path / "in", images(1, 80), 1)
    write(tmp_path / "in", images(2, 80), 2, other)
    with pytest.raises(ArtifactError, match=r"0001_fing.* and .*0002_fing.* cannot be compared"):
        compute_difficulty(tmp_path / "in", tmp_path / "out.parquet", settings())


def test_fingerprints_of_another_size_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in", images(1, 80), 1)
    larger = changed("fingerprint", lambda table: pa.array([[1] * 27] * len(table)))(images(2, 80))
    write(tmp_path / "in", larger, 2)
    with pytest.raises(ArtifactError, match=r"0002_fing.*fingerprints of 27 values, those before have 48"):
        compute_difficulty(tmp_path / "in", tmp_path / "out.parquet", settings())


@pytest.mark.parametrize(("count", "message"), [(None, "run the fingerprint stage first"), (0, "have no rows")])
def test_nothing_to_compare_is_refused(tmp_path: Path, count: int | None, message: str) -> None:
    (tmp_path / "in").mkdir()
    if count is not None:
        write(tmp_path / "in", images(1, 5).slice(0, 0), 1)
    with pytest.raises(InputError, match=message):
        compute_difficulty(tmp_path / "in", tmp_path / "out.parquet", settings())


def test_a_file_without_rows_is_no_obstacle(tmp_path: Path) -> None:
    write(tmp_path / "in", images(1, 5).slice(0, 0), 1, None)
    write(tmp_path / "in", images(2, 60), 2)
    assert compute_difficulty(tmp_path / "in", tmp_path / "out.parquet", settings()).rows == 60


def _compute_and_die(directory: Path, out: Path, at: int) -> None:
    seen = 0

    def die(done: int, total: int | None, message: str) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    compute_difficulty(directory, out, settings({"row_group_size": 40}), die)


@pytest.mark.parametrize("at", [2, 4, 6])
def test_kill_9_leaves_nothing_and_the_rerun_is_identical(tmp_path: Path, at: int) -> None:
    write(tmp_path / "in", images(1, 150), 1)
    out = tmp_path / "out" / "d.parquet"
    process = multiprocessing.get_context("spawn").Process(target=_compute_and_die, args=(tmp_path / "in", out, at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    for path in (out, tmp_path / "other.parquet"):
        compute_difficulty(tmp_path / "in", path, settings({"row_group_size": 40}))
    assert sha256_file(out) == sha256_file(tmp_path / "other.parquet")
    assert sorted(path.name for path in out.parent.iterdir()) == [".d.parquet.lock", "_manifests", "d.parquet"]


@pytest.mark.real_data
def test_real_tars_agree_with_the_earlier_pipeline(tmp_path: Path, real_data: Path) -> None:
    chosen = Settings.model_validate({"data": {"min_negative_distance_m": 0}, "infrastructure": {"device": "cpu"}})
    tables = []
    for name in ("0201", "0202"):
        tar = real_data / "buildings" / f"{name}.tar"
        ingest_tar(tar, tmp_path / "intermediates", settings=chosen)
        made = fingerprint_tar(tar, tmp_path / "intermediates" / f"{name}.parquet", tmp_path / "fp", settings=chosen)
        tables.append(pq.read_table(made.artifact))
    out = tmp_path / "difficulty.parquet"
    report = compute_difficulty(tmp_path / "fp", out, chosen)
    expected, edges = reference(tables, components=32, neighbors=150, k0=50, seed=42, min_m=0)
    assert_same(out, expected, edges)
    assert report.rows == 60
    assert report.details["buildings"] == 25
    # The seven facade points of 0201 stand in one street; at 30 m some of them are no negatives of each other.
    near = Settings.model_validate({"infrastructure": {"device": "cpu"}})
    report = compute_difficulty(tmp_path / "fp", out, near)
    assert report.details["excluded_near"] > 0
    expected, edges = reference(tables, components=32, neighbors=150, k0=50, seed=42, min_m=30)
    assert_same(out, expected, edges)


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path / "in", images(1, 80), 1)
    with pytest.raises(ModelError, match="no-such-device"):
        compute_difficulty(tmp_path / "in", tmp_path / "o.parquet", settings({"device": "no-such-device"}))
    assert compute_difficulty(tmp_path / "in", tmp_path / "o.parquet", settings({"device": "auto"})).rows == 80
