"""Neighbours in 32 components and the whole difficulty stage, beside scikit-learn's ball tree.

The reference is written from the specification. A ball tree takes minutes to hours at these sizes, so it is given a
part of the queries (its building, which is quick, included) and compared by queries a second. What both found for the
same images is compared as well.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Prepared, Row, compare, main

K = 200
COMPONENTS = 32
CHECKED = 100
SIDE = 16


def scores(count: int) -> npt.NDArray[np.float32]:
    """Points in 32 components whose spread falls off as that of fingerprints of photographs, in 2 000 loose groups."""
    rng = np.random.default_rng(0)
    spread = np.arange(1, COMPONENTS + 1) ** -0.7
    groups = rng.standard_normal((2000, COMPONENTS))[rng.integers(0, 2000, count)]
    return np.asarray((groups + rng.standard_normal((count, COMPONENTS))) * spread, np.float32)


def load_ours(count: int) -> npt.NDArray[np.float32]:
    """Data and imports, which are not timed."""
    import faiss  # noqa: F401

    import spatial_core.retrieval.approximate  # noqa: F401

    return scores(count)


def load_reference(count: int) -> npt.NDArray[np.float32]:
    """Data and imports, which are not timed."""
    import sklearn.neighbors  # noqa: F401

    return scores(count)


def exact(queries: int, points: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Exhaustive search of the first `queries` points among all."""
    from spatial_core.retrieval.search import search

    distances, _ = search(points[:queries], points, K)
    return {"sample": distances[:CHECKED, -1].tolist()}


def approximate(queries: int, points: npt.NDArray[np.float32]) -> dict[str, Any]:
    """The inverted file, its building, tuning and measuring included."""
    from spatial_core.retrieval.approximate import ApproximateSearch

    index = ApproximateSearch(points, K)
    distances, _ = index.search(points[:queries], K)
    return {"sample": distances[:CHECKED, -1].tolist(), "recall": index.recall, "probes": index.probes}


def ball_tree(queries: int, points: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Build the tree and query it."""
    from sklearn.neighbors import BallTree

    distances, _ = BallTree(points).query(points[:queries], k=K)
    return {"sample": distances[:CHECKED, -1].tolist()}


def make_fingerprints(folder: Path, count: int) -> None:
    """Fingerprints of smooth random images, three a building, in one file."""
    import pyarrow as pa

    from spatial_core.storage.parquet import parquet_sink, vectors_to_arrow

    rng = np.random.default_rng(0)
    y, x = np.mgrid[0 : 1 : SIDE * 1j, 0 : 1 : SIDE * 1j]
    waves = [np.cos(np.pi * (a * x + b * y))[..., None] * rng.uniform(0.5, 1, 3) for a in range(8) for b in range(8)]
    basis = np.stack(waves).reshape(64, -1) / np.arange(1, 65)[:, None] ** 0.8
    pixels = np.clip(128 + 60 * rng.standard_normal((count, 64)) @ basis, 0, 255).astype(np.uint8)
    number = np.arange(count)
    columns = {
        "building_id": [f"0001_{i}" for i in number // 3],
        "streetview_image_id": [f"0001_{i}" for i in number],
        "target_lat": 45 + (number // 3) * 1e-4,
        "target_lon": 9 + (number // 3) * 1e-4,
        "fingerprint": vectors_to_arrow(pixels),
    }
    table = pa.table(columns)
    with parquet_sink(folder / "0001_fingerprints.parquet", table.schema) as writer:
        writer.write_table(table)


def load_stage(folder: Path) -> Path:
    """Imports, which are not timed."""
    import faiss  # noqa: F401
    import pandas  # noqa: F401
    import sklearn.decomposition  # noqa: F401
    import torch  # noqa: F401

    import spatial_core.street_view.difficulty  # noqa: F401

    return folder


def stage(folder: Path) -> dict[str, Any]:
    """The stage as it is, without a minimum distance, which the reference does not know."""
    from spatial_core.config.settings import Settings
    from spatial_core.street_view.difficulty import compute_difficulty

    settings = Settings.model_validate({"data": {"min_negative_distance_m": 0}})
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        report = compute_difficulty(folder, Path(out) / "difficulty.parquet", settings)
        return {"sample": _last_distances(report.artifact), "band_edges": report.details["band_edges"]}


def stage_reference(folder: Path) -> dict[str, Any]:
    """PCA, ball tree, then image by image in Python, through pandas into parquet."""
    import pandas as pd
    import pyarrow.parquet as pq
    from sklearn.decomposition import PCA
    from sklearn.neighbors import BallTree

    table = pd.read_parquet(folder / "0001_fingerprints.parquet")
    pixels = np.stack(table["fingerprint"].to_list()).astype(np.float32) / np.float32(255)
    points = PCA(COMPONENTS, random_state=42).fit_transform(pixels)
    found = BallTree(points).query(points, k=K)
    buildings = table["building_id"].to_numpy()
    kept, scales = [], []
    for i, (distances, rows) in enumerate(zip(*found, strict=True)):
        other = buildings[rows] != buildings[i]
        kept.append((buildings[rows][other][:150], distances[other][:150]))
        scales.append(kept[-1][1][49])
    sample = np.random.default_rng(42).choice(len(kept), min(len(kept), 10_000), replace=False)
    ratios = np.concatenate([kept[i][1] / scales[i] for i in sample])
    edges = np.percentile(ratios, [5, 10, 20, 40, 60, 85])
    records = [
        {
            "target_coord_hash": name,
            "neighbor_building_ids": near.tolist(),
            "neighbor_distances_meters": distances.tolist(),
            "neighbor_bands": np.searchsorted(edges, distances / scale, side="right").tolist(),
        }
        for name, (near, distances), scale in zip(table["streetview_image_id"], kept, scales, strict=True)
    ]
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        path = Path(out) / "difficulty.parquet"
        pd.DataFrame(records).to_parquet(path, compression="snappy")
        assert pq.read_metadata(path).num_rows == len(table)
        return {"sample": _last_distances(path), "band_edges": edges.tolist()}


def _last_distances(path: Path) -> list[float]:
    import pyarrow.parquet as pq

    batch = next(pq.ParquetFile(path).iter_batches(CHECKED, columns=["neighbor_distances_meters"]))
    return [row[-1] for row in batch.column(0).to_pylist()]


def _compared(row: Row, tolerance: float) -> Row:
    """The row with how far the distances to the last neighbour are off, in place of the samples.

    Raises:
        RuntimeError: if they are further off than allowed.
    """
    figures = [dict(cost.figures) for cost in (row.ours, row.reference)]
    found, expected = (np.array(each.pop("sample")) for each in figures)
    off = float(np.abs(found / expected - 1).max())
    if off > tolerance:
        raise RuntimeError(f"{row.stage}: distances to the last neighbour are {off:.2g} off the reference")
    figures[0]["last_distance_off"] = off
    note = f"recall {figures[0]['recall']:.4f}" if "recall" in figures[0] else ""
    ours, reference = replace(row.ours, figures=figures[0]), replace(row.reference, figures=figures[1])
    return replace(row, ours=ours, reference=reference, note=note)


def rows(scale: float = 1.0) -> list[Row]:
    """Queries a second at 100 k and 300 k points, and images a second of the whole stage."""
    measured = []
    for name, contender, count, queries, asked, rounds, target in (
        ("exact", exact, 100_000, 100_000, 1000, 3, 50.0),
        ("exact", exact, 300_000, 20_000, 500, 1, 55.0),
        ("approximate", approximate, 300_000, 300_000, 500, 1, 90.0),
    ):
        size, mine, theirs = (max(CHECKED * 5, int(number * scale)) for number in (count, queries, asked))
        row = compare(
            f"neighbours, {name}, {size} x {COMPONENTS}, k={K}",
            "queries",
            Prepared(partial(load_ours, size), partial(contender, mine)),
            Prepared(partial(load_reference, size), partial(ball_tree, theirs)),
            mine,
            rounds=rounds,
            target=target,
            reference_items=theirs,
        )
        measured.append(_compared(row, 1e-5 if name == "exact" else 0.2))
    images = max(600, int(20_000 * scale))
    folder = Path(tempfile.mkdtemp(prefix="bench-neighbours-"))
    try:
        make_fingerprints(folder / "in", images)
        row = compare(
            f"difficulty, whole stage, {images} images",
            "images",
            Prepared(partial(load_stage, folder / "in"), stage),
            Prepared(partial(load_stage, folder / "in"), stage_reference),
            images,
            rounds=1,
        )
    finally:
        shutil.rmtree(folder)
    return [*measured, _compared(row, 2e-3)]


if __name__ == "__main__":
    main(rows)
