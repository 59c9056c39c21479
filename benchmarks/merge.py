"""Embeddings -> splits: two streaming passes beside the earlier pipeline's pandas merge.

The reference is written from the specification: ids counted in a dictionary, buildings sorted and permuted, every batch
taken through pandas, list<double> in and out. Each reads the files its own pipeline writes, made before the clock
starts. The last two lines have eight times the rows of each other: what matters in them is the peak memory.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Prepared, Row, compare, main

SHARDS = 4
VIEWS = 3
BATCH_ROWS = 100_000


def make_inputs(folder: Path, rows: int, dim: int) -> tuple[Path, Path]:
    """The same embeddings as our embed stage and as the earlier pipeline write them, in four shards each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from spatial_core import schemas
    from spatial_core.report import Report
    from spatial_core.storage.parquet import parquet_sink, vectors_to_arrow
    from spatial_core.storage.provenance import Provenance, record_artifact

    new, old = folder / "new", folder / "old"
    old.mkdir(parents=True)
    schema = schemas.embeddings(dim, "float32")
    carried = [*(field.name for field in schemas.IDENTITY), *(field.name for field in schemas.SOURCE)]
    provenance = Provenance("embed", "1", "0", model={"id": "seeded"})
    rng = np.random.default_rng(0)
    step = max(1, 4_000_000 // dim)
    for shard in range(SHARDS):
        name = f"{shard + 1:04d}_embeddings.parquet"
        count = rows // SHARDS
        old_schema = pa.schema(
            [*(schema.field(name) for name in carried), pa.field("embedding", pa.list_(pa.float64()))]
        )
        with (
            parquet_sink(new / name, schema, provenance) as ours,
            pq.ParquetWriter(old / name, old_schema, compression="snappy") as theirs,
        ):
            for start in range(0, count, step):
                patch = np.arange(start, min(count, start + step))
                matrix = rng.standard_normal((len(patch), dim), np.float32)
                columns: dict[str, Any] = {
                    "dataset_id": np.full(len(patch), shard + 1),
                    "target_id": patch // VIEWS,
                    "patch_id": patch,
                    "target_lat": 45 + (patch // VIEWS) * 1e-5,
                    "target_lon": 9 + shard + (patch // VIEWS % 300) * 1e-4,
                    "building_id": [f"{shard + 1:04d}_{number}" for number in patch // VIEWS],
                    "streetview_image_id": [f"{shard + 1:04d}_{number}" for number in patch],
                    "embedding": vectors_to_arrow(matrix),
                }
                arrays = [
                    columns[field.name]
                    if field.name in columns
                    else pa.array(np.zeros(len(patch), int)).cast(field.type)
                    for field in schema
                ]
                table = pa.table(arrays, schema=schema)
                ours.write_table(table)
                offsets = pa.array(np.arange(len(patch) + 1) * dim, pa.int32())
                lists = pa.ListArray.from_arrays(offsets, matrix.astype(np.float64).reshape(-1))
                theirs.write_table(table.select(carried).append_column("embedding", lists).cast(old_schema))
        record_artifact(new / name, "key", provenance, Report("embed", new / name, count, count, count))
    return new, old


def load_ours(source: Path) -> Path:
    """Imports, which are not timed."""
    import pandas  # noqa: F401 - pyarrow imports it at its first conversion
    import scipy.spatial  # noqa: F401

    import spatial_core.street_view.splits  # noqa: F401

    return source


def load_reference(source: Path) -> Path:
    """Imports, which are not timed."""
    import pandas  # noqa: F401
    import pyarrow.dataset  # noqa: F401

    return source


def ours(source: Path) -> dict[str, Any]:
    """The stage as it is: checks, digests of the output and leakage included."""
    from spatial_core.config.settings import Settings
    from spatial_core.street_view.splits import merge_splits

    out = Path(tempfile.mkdtemp(dir=source.parent))
    try:
        report = merge_splits(source, out / "merged", Settings())
        return {"rows": report.rows, "bytes": report.bytes}
    finally:
        shutil.rmtree(out)


def reference(source: Path) -> dict[str, Any]:
    """Count, permute, and send every batch through pandas."""
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    out = Path(tempfile.mkdtemp(dir=source.parent))
    writers: dict[str, pq.ParquetWriter] = {}
    kept = 0
    try:
        data = ds.dataset(sorted(source.glob("*_embeddings.parquet")))
        counts: Counter[str] = Counter()
        for batch in data.to_batches(columns=["dataset_id", "target_id", "patch_id"]):
            counts.update(_building_ids(batch.to_pandas()))
        ids = np.array(sorted(name for name, count in counts.items() if count > 1))
        ids = ids[np.random.default_rng(42).permutation(len(ids))]
        edges = [int(len(ids) * 0.7), int(len(ids) * 0.7) + int(len(ids) * 0.15)]
        names = ("train", "val", "test")
        split = {name: split for split, part in zip(names, np.split(ids, edges), strict=True) for name in part}
        for batch in data.to_batches(batch_size=BATCH_ROWS):
            frame = batch.to_pandas()
            frame["building_id"] = _building_ids(frame)
            frame = frame[frame["building_id"].map(counts) > 1]
            frame = frame.drop(columns=["tar_file", "image_path"])
            for name, part in frame.groupby(frame["building_id"].map(split)):
                table = pa.Table.from_pandas(part, preserve_index=False)
                if name not in writers:
                    writers[name] = pq.ParquetWriter(out / f"{name}.parquet", table.schema, compression="snappy")
                writers[name].write_table(table)
                kept += len(part)
        for writer in writers.values():
            writer.close()
        return {"rows": kept, "bytes": sum(file.stat().st_size for file in out.iterdir())}
    finally:
        shutil.rmtree(out)


def _building_ids(frame: Any) -> Any:
    return frame["dataset_id"].astype(int).astype(str).str.zfill(4) + "_" + frame["target_id"].astype(str)


def rows(scale: float = 1.0) -> list[Row]:
    """Rows a second of ours and of the reference at four sizes."""
    measured = []
    for count, dim, rounds, reference_count, target in (
        (200_000, 384, 3, 200_000, 5.0),
        (50_000, 4096, 3, 50_000, 5.0),
        (50_000, 1024, 1, 50_000, None),
        (400_000, 1024, 1, 50_000, None),
    ):
        count, reference_count = (max(400, int(size * scale)) for size in (count, reference_count))  # noqa: PLW2901
        folder = Path(tempfile.mkdtemp(prefix="bench-merge-"))
        try:
            new, old = make_inputs(folder, count, dim)
            if reference_count < count:
                shutil.rmtree(old)
                _, old = make_inputs(folder / "reference", reference_count, dim)
            row = compare(
                f"merge, {count} x {dim}",
                "rows",
                Prepared(partial(load_ours, new), ours),
                Prepared(partial(load_reference, old), reference),
                count,
                rounds=rounds,
                target=target,
                reference_items=reference_count,
                note="" if reference_count == count else f"reference on {reference_count} rows",
            )
        finally:
            shutil.rmtree(folder)
        if row.ours.figures["rows"] < count - SHARDS or row.reference.figures["rows"] < reference_count - SHARDS:
            raise RuntimeError(f"{row.stage}: rows were lost: {row.ours.figures}, {row.reference.figures}")
        measured.append(row)
    return measured


if __name__ == "__main__":
    main(rows)
