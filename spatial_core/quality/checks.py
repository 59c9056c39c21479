"""Checks of every artifact, each a pure function of paths and settings. None of them changes anything.

Counting over rows is done by DuckDB, which streams; vectors are read in record batches, because their lengths and
finiteness are matrix operations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.errors import SpatialError
from spatial_core.lake.duck import query_connection, quoted
from spatial_core.quality.outcome import CheckOutcome, judge
from spatial_core.storage.parquet import open_parquet, vectors_to_numpy
from spatial_core.storage.provenance import verify_artifact

SPLITS = ("train", "val", "test")
_UNIT_TOLERANCE = 1e-3


def _row(sql: str) -> dict[str, Any]:
    """The single row of a query as a dict."""
    with query_connection() as connection:
        cursor = connection.execute(sql)
        names = [column[0] for column in cursor.description]
        return dict(zip(names, cursor.fetchone(), strict=True))


def _table(path: Path) -> str:
    return f"read_parquet({quoted(str(path))})"


def vector_faults(path: Path, column: str, *, unit: bool) -> tuple[list[str], int]:
    """Faults of a vector column (null, non-finite, all zero, not of unit length) and the number of vectors."""
    file = open_parquet(path, required=[column])
    counts = {"not finite": 0, "all zero": 0, "not of unit length": 0}
    total = 0
    for batch in file.iter_batches(batch_size=16_384, columns=[column]):
        matrix = vectors_to_numpy(batch.column(0)).astype(np.float32, copy=False)
        norms = np.linalg.norm(matrix, axis=1)
        finite = np.isfinite(norms)
        counts["not finite"] += int((~finite).sum())
        counts["all zero"] += int((norms == 0).sum())
        if unit:
            counts["not of unit length"] += int((np.abs(norms[finite] - 1) > _UNIT_TOLERANCE).sum())
        total += len(matrix)
    return [f"{count} vectors are {fault}" for fault, count in counts.items() if count], total


def intermediates_sound(path: Path, settings: Settings) -> CheckOutcome:
    """Schema, rows, unique image ids, coordinates, and the share of rejected members, folder entries left out."""
    schemas.require(open_parquet(path).schema_arrow, schemas.INTERMEDIATES, str(path))
    found = _row(
        "select count(*) as rows, count(distinct streetview_image_id) as images, "
        "count(distinct building_id) as buildings, "
        "count(*) filter (not (target_lat between -90 and 90 and target_lon between -180 and 180)) as off_earth, "
        f"count(*) filter (image_bytes <= 0 or image_offset < 512) as misplaced from {_table(path)}"
    )
    rejects = path.with_name(f"{path.stem}_rejects.parquet")
    refused = {"rejected": 0, "folders": 0}
    if rejects.exists():
        refused = _row(
            f"select count(*) filter (reason <> {quoted(schemas.FOLDER_REASON)}) as rejected, "
            f"count(*) filter (reason = {quoted(schemas.FOLDER_REASON)}) as folders from {_table(rejects)}"
        )
    rejected = refused["rejected"]
    files = rejected + 2 * found["rows"]
    fraction = rejected / files if files else 0.0
    faults = []
    if not found["rows"]:
        faults.append("no images")
    if found["images"] != found["rows"]:
        faults.append(f"{found['rows'] - found['images']} duplicate image ids")
    if found["off_earth"]:
        faults.append(f"{found['off_earth']} targets with impossible coordinates")
    if found["misplaced"]:
        faults.append(f"{found['misplaced']} images without a place in the tar")
    if fraction > settings.process_tar.max_rejected_fraction:
        faults.append(
            f"{rejected} of {files} files rejected ({fraction:.0%}), "
            f"above process_tar.max_rejected_fraction = {settings.process_tar.max_rejected_fraction:.0%}; see {rejects}"
        )
    summary = f"{found['rows']} images of {found['buildings']} buildings, {rejected} of {files} files rejected"
    return judge("intermediates_sound", faults, summary, members=files + refused["folders"], **refused, **found)


def _per_tar_vectors(name: str, path: Path, column: str, *, vectors: bool) -> CheckOutcome:
    schemas.require(open_parquet(path).schema_arrow, schemas.IDENTITY, str(path))
    found = _row(f"select count(*) as rows, count(distinct streetview_image_id) as images from {_table(path)}")
    faults = [] if found["rows"] else ["no rows"]
    if found["images"] != found["rows"]:
        faults.append(f"{found['rows'] - found['images']} duplicate image ids")
    if vectors:
        faults += vector_faults(path, column, unit=False)[0]
    return judge(name, faults, f"{found['rows']} rows with {column}", **found)


def fingerprints_sound(path: Path) -> CheckOutcome:
    """Schema, rows and unique image ids; no fingerprint may be a single colour all over in black."""
    outcome = _per_tar_vectors("fingerprints_sound", path, "fingerprint", vectors=False)
    black = _row(f"select count(*) filter (list_max(fingerprint) = 0) as black from {_table(path)}")["black"]
    if black:
        return judge(outcome.name, [f"{black} fingerprints are all zero: unreadable images"], "", **outcome.figures)
    return outcome


def embeddings_sound(path: Path) -> CheckOutcome:
    """Schema, rows, unique image ids, and vectors that are finite and not zero."""
    return _per_tar_vectors("embeddings_sound", path, "embedding", vectors=True)


def splits_sound(merged_dir: Path, settings: Settings) -> CheckOutcome:
    """No building or image in two splits, no singletons, no nulls, finite vectors, shares near the ratios."""
    paths = {split: merged_dir / f"{split}.parquet" for split in SPLITS}
    for path in paths.values():
        schemas.require(open_parquet(path).schema_arrow, schemas.IDENTITY, str(path))
    union = " union all ".join(
        f"select {quoted(split)} as split, building_id, streetview_image_id from {_table(path)}"
        for split, path in paths.items()
    )
    found = _row(
        f"with images as ({union}), buildings as (select building_id, count(*) as images, "
        "count(distinct split) as splits, any_value(split) as split from images group by building_id) "
        "select (select count(*) from images) as images, count(*) as buildings, "
        "count(*) filter (splits > 1) as leaking, count(*) filter (images = 1) as singletons, "
        "count(*) filter (building_id is null) as nameless, "
        "(select count(*) - count(distinct streetview_image_id) from images) as duplicates, "
        "count(*) filter (split = 'train') as train, count(*) filter (split = 'val') as val, "
        "count(*) filter (split = 'test') as test from buildings"
    )
    faults = []
    for key, fault in (
        ("leaking", "buildings are in more than one split"),
        ("singletons", "buildings have a single image"),
        ("nameless", "rows have no building id"),
        ("duplicates", "images occur twice"),
    ):
        if found[key]:
            faults.append(f"{found[key]} {fault}")
    if not found["train"]:
        faults.append("the train split has no buildings")
    for path in paths.values():
        faults += [f"{path.name}: {fault}" for fault in vector_faults(path, "embedding", unit=False)[0]]
    faults += _ratio_faults(found, settings)
    summary = f"{found['buildings']} buildings: train {found['train']}, val {found['val']}, test {found['test']}"
    return judge("splits_sound", faults, summary, **found)


def _ratio_faults(found: dict[str, Any], settings: Settings) -> list[str]:
    """Shares further from the ratios than five standard errors; blocks of buildings are no independent draws."""
    if settings.data.split_strategy != "building" or not found["buildings"]:
        return []
    faults = []
    total = found["buildings"]
    for split in SPLITS:
        ratio = getattr(settings.data, f"{split}_ratio")
        allowed = 5 * np.sqrt(ratio * (1 - ratio) / total) + 1 / total
        if abs(found[split] / total - ratio) > allowed:
            faults.append(f"{split} holds {found[split] / total:.1%} of buildings, data.{split}_ratio is {ratio:.1%}")
    return faults


def difficulty_sound(path: Path, merged_dir: Path | None = None) -> CheckOutcome:
    """Lists of equal length, bands 0-6, distances ascending, no anchor its own neighbour; train anchors covered."""
    schemas.require(open_parquet(path).schema_arrow, schemas.DIFFICULTY, str(path))
    found = _row(
        "select count(*) as anchors, count(distinct target_coord_hash) as images, "
        "count(*) filter (len(neighbor_building_ids) = 0) as lonely, "
        "count(*) filter (len(neighbor_building_ids) <> len(neighbor_bands) or "
        "len(neighbor_building_ids) <> len(neighbor_distances_meters)) as ragged, "
        "count(*) filter (list_min(neighbor_bands) < 0 or list_max(neighbor_bands) > 6) as wild, "
        "count(*) filter (neighbor_distances_meters <> list_sort(neighbor_distances_meters)) as unsorted "
        f"from {_table(path)}"
    )
    faults = [] if found["anchors"] else ["no anchors"]
    for key, fault in (
        ("ragged", "anchors have lists of different lengths"),
        ("wild", "anchors have bands outside 0-6"),
        ("unsorted", "anchors have neighbours out of order"),
    ):
        if found[key]:
            faults.append(f"{found[key]} {fault}")
    if found["images"] != found["anchors"]:
        faults.append(f"{found['anchors'] - found['images']} duplicate anchors")
    if merged_dir is not None and (merged_dir / "train.parquet").exists():
        uncovered = _row(
            f"select count(*) as images from {_table(merged_dir / 'train.parquet')} where streetview_image_id "
            f"not in (select target_coord_hash from {_table(path)})"
        )["images"]
        found["uncovered"] = uncovered
        if uncovered:
            faults.append(f"{uncovered} training images have no difficulty; materialize fingerprints of their tars")
    summary = f"{found['anchors']} anchors, {found['lonely']} without any neighbour"
    return judge("difficulty_sound", faults, summary, **found)


def checkpoint_sound(path: Path) -> CheckOutcome:
    """Weights and record as their digests say, every weight finite, and at least one validation figure."""
    # torch takes seconds to import, and most callers of this module never need it.
    import torch

    from spatial_core.metric_learning.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    weights = list(checkpoint.projector.state_dict().values())
    broken = sum(int((~torch.isfinite(tensor)).sum()) for tensor in weights)
    faults = [f"{broken} weights are not finite"] if broken else []
    parameters = sum(tensor.numel() for tensor in weights)
    summary = f"epoch {checkpoint.epoch}, {parameters:,} parameters"
    return judge("checkpoint_sound", faults, summary, parameters=parameters, metrics=dict(checkpoint.metrics))


def study_sound(path: Path) -> CheckOutcome:
    """The study matches its digest; only finished trials; the best is the best of those that ran to their end."""
    from spatial_core.metric_learning.best_trial import read_advice

    intact = artifact_intact(path, "study_sound")
    if not intact.passed:
        return intact
    advice = read_advice(path)
    trials = json.loads(path.read_bytes())["trials"]
    complete = {trial["number"]: trial["value"] for trial in trials if trial["state"] == "complete"}
    faults = [f"trial {number} reaches {value}" for number, value in complete.items() if not 0 <= value <= 1]
    if complete and (advice.trial not in complete or advice.value != max(complete.values())):
        faults.append(f"trial {advice.trial} is called the best and is not")
    figures = {"trials": len(trials), "complete": len(complete), "best": advice.value}
    if not complete and not faults:
        summary = "no trial was completed; training uses the hyper-parameters of the settings"
        return CheckOutcome("study_sound", False, summary, "warn", figures)
    summary = f"{len(complete)} of {len(trials)} trials completed, the best reaches {advice.value}"
    return judge("study_sound", faults, summary, **figures)


def report_sound(report_dir: Path) -> CheckOutcome:
    """The report matches its digests and holds its page, its picture, its table and figures for a held-out split."""
    wanted = ("metrics.json", "report.html", "summary.png", "summary.md")
    faults = [f"{name} is missing" for name in wanted if not (report_dir / name).is_file()]
    intact = artifact_intact(report_dir, "report_sound")
    if not intact.passed:
        faults.append(intact.summary)
    rows = [] if faults else json.loads((report_dir / "metrics.json").read_text())["headline"]
    return judge("report_sound", faults, f"{len(rows)} lines of figures", lines=len(rows))


def vectors_sound(dataset_dir: Path) -> CheckOutcome:
    """New-data vectors: finite, of unit length, in every part."""
    faults: list[str] = []
    total = 0
    parts = sorted((dataset_dir / "parts").glob("*.parquet"))
    for part in parts:
        found, rows = vector_faults(part, "embedding", unit=True)
        faults += [f"{part.name}: {fault}" for fault in found]
        total += rows
    return judge("vectors_sound", faults, f"{total} unit vectors in {len(parts)} parts", rows=total, parts=len(parts))


def buildings_sound(path: Path) -> CheckOutcome:
    """Per-building vectors: unit length, finite, one row an OSMID."""
    faults, rows = vector_faults(path, "embedding", unit=True)
    twice = _row(f"select count(*) - count(distinct OSMID) as rows from {_table(path)} where OSMID is not null")["rows"]
    if twice:
        faults.append(f"{twice} OSMIDs occur more than once")
    return judge("buildings_sound", faults, f"{rows} buildings", rows=rows)


def usage_sound(path: Path) -> CheckOutcome:
    """Schema, every job once, none that ended before it started, a cost for each."""
    schemas.require(open_parquet(path).schema_arrow, schemas.CLUSTER_USAGE, str(path))
    found = _row(
        "select count(*) as jobs, count(distinct (job, start)) as distinct_jobs, "
        'count(*) filter ("end" < start) as backwards, count(*) filter (isnan(cost) or cost < 0) as priceless '
        f"from {_table(path)}"
    )
    faults = []
    if found["distinct_jobs"] != found["jobs"]:
        faults.append(f"{found['jobs'] - found['distinct_jobs']} jobs are listed twice")
    if found["backwards"]:
        faults.append(f"{found['backwards']} jobs ended before they started")
    if found["priceless"]:
        faults.append(f"{found['priceless']} jobs have no cost")
    return judge("usage_sound", faults, f"{found['jobs']} jobs", **found)


def artifact_intact(path: Path, name: str) -> CheckOutcome:
    """Every byte of a folder or file as its manifest recorded it."""
    try:
        verify_artifact(path)
    except SpatialError as error:
        return judge(name, [str(error)], "")
    return judge(name, [], f"{path.name} matches its manifest")


def model_sound(model_dir: Path) -> CheckOutcome:
    """The published folder matches its digests and has a card, a licence, weights and golden vectors."""
    wanted = ("config.json", "model.safetensors", "README.md", "LICENSE", "golden.json", "preprocessor_config.json")
    faults = [f"{name} is missing" for name in wanted if not (model_dir / name).is_file()]
    intact = artifact_intact(model_dir, "model_sound")
    if not intact.passed:
        faults.append(intact.summary)
    return judge("model_sound", faults, f"{model_dir.name}: complete, every digest matches")


def schema_columns(schema: pa.Schema) -> list[tuple[str, str, str]]:
    """(name, type, description) of every column, for Dagster's column schema and the documentation."""
    return [(field.name, str(field.type), (field.metadata or {}).get(b"description", b"").decode()) for field in schema]
