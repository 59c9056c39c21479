"""Stage `merge`: all embeddings of a folder -> train, val and test, by building or by block of the city.

Two passes. The first reads ids and coordinates only, proves them well formed and counts each building's images; after
it every building's split is decided (`split_assignment`). The second copies rows: buildings with one image are left
out, the others go to their split, in the order of the inputs sorted by name. Both stream, so memory holds one entry a
building and a few row groups, whatever the number of rows.

Building ids carry their tar's number, so a later tar neither adds images to a known building nor changes its split.
The three files and `report.json` appear together or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError, InputError
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.atomic import atomic_directory, exclusive, write_json
from spatial_core.storage.parquet import parquet_sink, read_provenance
from spatial_core.storage.provenance import Provenance, artifact_digest, finished, record_artifact, stage_key
from spatial_core.storage.replaceable import require_replaceable
from spatial_core.street_view import embedding_files as files
from spatial_core.street_view.building_index import BuildingIndex, merge_indices
from spatial_core.street_view.leakage import measure_leakage
from spatial_core.street_view.split_assignment import DROPPED, SPLITS, assign_splits
from spatial_core.street_view.split_writer import RowGroupWriter

STAGE = "merge"
CODE_VERSION = "1"
REPORT_NAME = "report.json"
_CONFIG = (
    "global.seed",
    "data.train_ratio",
    "data.val_ratio",
    "data.test_ratio",
    "data.split_strategy",
    "data.block_size_m",
)
_THREADS = 2
# Values decoded at once: 2 MB stay in a core's cache. 16 MB took twice as long, half of it the kernel clearing pages.
_BATCH_VALUES = 1 << 19


def merge_splits(embeddings_dir: Path, output_dir: Path, settings: Settings, progress: Progress = silent) -> Report:
    """Merge `*_embeddings.parquet` into `train.parquet`, `val.parquet` and `test.parquet` beside `report.json`.

    Columns are those of the embeddings without `image_path` and `tar_file`, as far as every input has them. Vectors
    keep their type; list<double> of the earlier pipeline becomes FixedSizeList<float32>.

    Args:
        embeddings_dir: folder of embeddings files.
        output_dir: folder to replace; may hold nothing but an earlier merge.
        settings: ratios, strategy and seed.
        progress: called with rows copied.

    Returns:
        Report in rows; `details` is what `report.json` holds.

    Raises:
        InputError: if there are no inputs, or `output_dir` holds other files.
        ArtifactError: on malformed ids or coordinates, repeated images, vectors that are missing, not finite, zero or
            too long for float32, or inputs of different models.
    """
    started = time.perf_counter()
    inputs = files.list_embedding_files(embeddings_dir)
    digests = {file.path.name: artifact_digest(file.path) for file in inputs}
    config = settings.pick(*_CONFIG)
    key = stage_key(STAGE, CODE_VERSION, config, digests)
    with exclusive(output_dir):
        if (done := finished(output_dir, key)) is not None:
            return done
        require_replaceable(output_dir, STAGE, _proven(output_dir))
        total = sum(file.rows for file in inputs)
        indices = []
        with ThreadPoolExecutor(_THREADS, "index-file") as executor:
            for file, index in zip(inputs, executor.map(files.index_file, (file.path for file in inputs)), strict=True):
                progress(0, total, f"checked ids of {file.path.name}")
                indices.append(index)
        files.require_patches_in_one_file(inputs, indices)
        buildings = merge_indices(indices)
        split = assign_splits(buildings, settings.data, settings.seed)
        provenance = Provenance(STAGE, CODE_VERSION, settings.digest, config, digests, **_origin(inputs[0]))
        details = _details(buildings, split, settings, inputs, digests)
        written: dict[str, str] = {}
        with atomic_directory(output_dir) as folder:
            images = _copy(
                inputs,
                folder,
                buildings=buildings,
                split=split,
                provenance=provenance,
                batch_size=settings.data.batch_size,
                progress=progress,
                written=written,
            )
            if images != details["images"]:
                raise ArtifactError(f"{embeddings_dir}: files changed while they were merged; run merge again")
            write_json(folder / REPORT_NAME, details)
        kept = sum(images.values())
        report = Report(
            stage=STAGE,
            artifact=output_dir,
            rows=kept,
            rows_in=total,
            kept=kept,
            rejected={"singleton_building": details["singletons_dropped"]},
            seconds=time.perf_counter() - started,
            bytes=sum(file.stat().st_size for file in output_dir.iterdir()),
            details=details,
        )
        record_artifact(output_dir, key, provenance, report, written)
    return report


def _proven(folder: Path) -> set[str]:
    """Names of the splits whose footer says that they come from here, and of the report that lies beside them."""
    splits = {f"{name}.parquet" for name in SPLITS if _is_ours(folder / f"{name}.parquet")}
    return splits | {REPORT_NAME} if splits else splits


def _is_ours(file: Path) -> bool:
    try:
        provenance = read_provenance(file)
    except InputError:  # missing, or no parquet: nothing that shows where it came from
        return False
    return provenance is not None and provenance.stage == STAGE


def _origin(file: files.EmbeddingFile) -> dict[str, Any]:
    if file.provenance is None:
        return {}
    return {"model": file.provenance.model, "preprocessing": file.provenance.preprocessing}


def _copy(
    inputs: list[files.EmbeddingFile],
    folder: Path,
    *,
    buildings: BuildingIndex,
    split: npt.NDArray[np.int8],
    provenance: Provenance,
    batch_size: int,
    progress: Progress,
    written: dict[str, str],
) -> dict[str, int]:
    """Pass 2. Returns rows written by split, and leaves in `written` the digests of the files."""
    schema = files.merged_schema(inputs)
    others = [name for name in schema.names if name != "embedding"]
    plain = pa.schema([schema.field(name) for name in others])
    dim = schema.field("embedding").type.list_size
    batch_rows = max(1, min(batch_size, _BATCH_VALUES // dim))
    total, done = sum(file.rows for file in inputs), 0
    with ExitStack() as stack:
        sinks = [
            stack.enter_context(
                parquet_sink(folder / f"{name}.parquet", schema, provenance, plain_vectors=True, digests=written)
            )
            for name in SPLITS
        ]
        # Entered last: it waits for its threads before any file is closed.
        executor = stack.enter_context(ThreadPoolExecutor(1 + len(SPLITS), "copy-split"))
        writers = [RowGroupWriter(sink, schema, "embedding", executor) for sink in sinks]
        for file in inputs:
            row = 0
            for batch in _one_ahead(files.batches(file, schema, batch_rows), executor):
                matrix = files.vectors(batch, file, dim, row)
                columns = pa.RecordBatch.from_arrays(
                    [batch.column(name).cast(plain.field(name).type) for name in others], schema=plain
                )
                assigned = _splits_of(columns, buildings, split, file.path)
                for code, writer in enumerate(writers):
                    writer.add(columns, matrix, np.flatnonzero(assigned == code))
                row += len(batch)
                done += len(batch)
                progress(done, total, f"copying {file.path.name}")
        for writer in writers:
            writer.close()
    return {name: writer.rows for name, writer in zip(SPLITS, writers, strict=True)}


def _one_ahead(batches: Iterator[pa.RecordBatch], executor: Executor) -> Iterator[pa.RecordBatch]:
    """The batches, each decoded by the executor while the one before it is worked on."""
    ahead = executor.submit(next, batches, None)
    while (batch := ahead.result()) is not None:
        ahead = executor.submit(next, batches, None)
        yield batch


def _splits_of(
    columns: pa.RecordBatch, buildings: BuildingIndex, split: npt.NDArray[np.int8], path: Path
) -> npt.NDArray[np.int8]:
    rows = buildings.rows(columns.column("dataset_id").to_numpy(), columns.column("target_id").to_numpy())
    unknown = np.flatnonzero(rows < 0)
    if len(unknown):
        building = columns.column("building_id")[int(unknown[0])]
        raise ArtifactError(f"{path}: building {building} was not there a moment ago; run merge again")
    return split[rows]


def _details(
    buildings: BuildingIndex,
    split: npt.NDArray[np.int8],
    settings: Settings,
    inputs: list[files.EmbeddingFile],
    digests: dict[str, str],
) -> dict[str, Any]:
    data = settings.data
    codes = range(len(SPLITS))
    return {
        "strategy": data.split_strategy,
        "block_size_m": data.block_size_m if data.split_strategy == "spatial_block" else None,
        "seed": settings.seed,
        "ratios": {"train": data.train_ratio, "val": data.val_ratio, "test": data.test_ratio},
        "buildings": {SPLITS[code]: int(np.count_nonzero(split == code)) for code in codes},
        "images": {SPLITS[code]: int(buildings.images[split == code].sum()) for code in codes},
        "singletons_dropped": int(np.count_nonzero(split == DROPPED)),
        "rows_with_other_coordinates": buildings.disagreeing,
        "leakage": {name: leak.to_json() for name, leak in measure_leakage(buildings, split).items()},
        "dim": max(file.dim for file in inputs),
        "columns": files.merged_schema(inputs).names,
        "origin": inputs[0].origin,
        "inputs": {file.path.name: {"rows": file.rows, "sha256": digests[file.path.name]} for file in inputs},
    }
