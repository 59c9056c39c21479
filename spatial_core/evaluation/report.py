"""`evaluate`: the head on held-out buildings, as metrics.json, report.html, summary.png and summary.md.

Memory: the features of one split as stored (2 or 4 bytes a value), the projector's and the components' vectors of it
(2 KB an image), the covariance of the training features (8 D^2 bytes), and tiles of bounded size.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from spatial_core.config.settings import Settings
from spatial_core.errors import InputError
from spatial_core.evaluation.measure import SPLITS, Evaluation, Places, measure
from spatial_core.evaluation.page import render_page
from spatial_core.evaluation.spaces import PROJECTOR
from spatial_core.evaluation.summary import draw_summary, summary_markdown
from spatial_core.metric_learning.checkpoint import Checkpoint, load_checkpoint
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.atomic import atomic_directory, exclusive, write_json
from spatial_core.storage.digests import digest_json
from spatial_core.storage.provenance import Provenance, artifact_digest, finished, record_artifact, stage_key
from spatial_core.storage.replaceable import require_replaceable

STAGE = "evaluate"
CODE_VERSION = "1"
METRICS_FILE, PAGE_FILE, PICTURE_FILE, TABLE_FILE = "metrics.json", "report.html", "summary.png", "summary.md"


def evaluate_projector(
    merged_dir: Path,
    checkpoint: Path,
    output_dir: Path,
    settings: Settings,
    progress: Progress = silent,
    *,
    difficulty: Path | None = None,
    intermediates_dir: Path | None = None,
    raw_dir: Path | None = None,
) -> Report:
    """Measure same-building retrieval on val and test and publish the report folder.

    A split that is too small is reported as such; only a missing train.parquet is an error. Thumbnails are shown when
    the tars are there, and a report that lacked some is made again once they are.

    Args:
        merged_dir: folder of train.parquet, val.parquet and test.parquet.
        checkpoint: the head: `.safetensors`, its folder, or `.pt` of the earlier pipeline.
        output_dir: the report folder; replaced as a whole, so it may hold nothing but an earlier report.
        settings: `evaluation`, the seed, and the device.
        progress: called a few times a split.
        difficulty: difficulty table; default: that of the settings, when it exists.
        intermediates_dir: where byte offsets of images are; default: that of the settings.
        raw_dir: where the tars are; default: that of the settings.

    Returns:
        Report whose rows are queries and whose `details["headline"]` is the table of methods: split, method, sizes,
        every metric, and metric_ci as [low, high].

    Raises:
        InputError: if an input is missing, or `output_dir` holds other files.
        ArtifactError: if one is damaged.
        ModelError: if the head does not fit the features.
    """
    started = time.perf_counter()
    at = settings.locations
    if difficulty is None and at.difficulty_metadata_path.is_file():
        difficulty = at.difficulty_metadata_path
    places = Places(merged_dir, difficulty, intermediates_dir or at.intermediates_dir, raw_dir or at.raw_dir)
    if not (merged_dir / "train.parquet").is_file():
        raise InputError(
            f"{merged_dir / 'train.parquet'}: no such file; `evaluate` reads the folder that `merge` wrote"
        )
    head = load_checkpoint(checkpoint, settings.head)
    config = settings.pick("evaluation", "global.seed")
    inputs = _inputs(places, head)
    key = stage_key(STAGE, CODE_VERSION, config, inputs)
    with exclusive(output_dir):
        done = finished(output_dir, key)
        if done is not None and not _came_back(done, places):
            return done
        require_replaceable(output_dir, STAGE, _proven(output_dir))
        evaluation = measure(places, head, settings, progress)
        provenance = Provenance(
            STAGE,
            CODE_VERSION,
            settings.digest,
            config,
            inputs,
            dict(head.backbone.model),
            head.backbone.preprocessing,
        )
        progress(len(SPLITS), len(SPLITS) + 1, "writing the report")
        with atomic_directory(output_dir) as folder:
            _write(folder, evaluation, provenance, settings.evaluation.confidence)
        report = Report(
            stage=STAGE,
            artifact=output_dir,
            rows=sum(split.queries for split in evaluation.splits),
            rows_in=evaluation.images,
            kept=evaluation.images,
            seconds=time.perf_counter() - started,
            bytes=sum(file.stat().st_size for file in output_dir.iterdir()),
            unit="images",
            details=_details(evaluation, places),
        )
        record_artifact(output_dir, key, provenance, report)
    progress(len(SPLITS) + 1, len(SPLITS) + 1, "done")
    return report


def metrics_record(evaluation: Evaluation, provenance: Provenance) -> dict[str, Any]:
    """metrics.json: `headline` (see `evaluate_projector`), `splits` by name, `gallery`, `checkpoint`, `provenance`."""
    head, pca, pictures = evaluation.checkpoint, evaluation.pca, evaluation.pictures
    return {
        "headline": _headline(evaluation),
        "splits": {split.split: split.to_json() for split in evaluation.splits},
        "gallery": None if pictures is None else pictures.gallery.to_json(),
        "checkpoint": {
            "epoch": head.epoch,
            "parameters": head.projector.parameter_count,
            "weights_sha256": head.weights_sha256,
            "projector": head.config.to_json(),
        },
        "pca": None
        if pca is None
        else {
            "components": pca.components.shape[1],
            "train_images": pca.rows,
            "explained_variance": round(pca.explained, 6),
        },
        "provenance": json.loads(provenance.to_json()),
    }


def _inputs(places: Places, head: Checkpoint) -> dict[str, str]:
    inputs = {"merged": artifact_digest(places.merged_dir)}
    inputs["checkpoint"] = head.weights_sha256
    # The history is drawn too, and a run that went on may have kept the weights.
    inputs["checkpoint history"] = digest_json([head.epoch, list(head.history)])
    if places.difficulty is not None:
        inputs["difficulty"] = artifact_digest(places.difficulty)
    return inputs


def _proven(folder: Path) -> set[str]:
    """The names of a report, if the folder's figures say that they were measured here."""
    try:
        stage = json.loads((folder / METRICS_FILE).read_bytes())["provenance"]["stage"]
    except (OSError, ValueError, KeyError, TypeError):  # no file, or one of another program
        return set()
    return {METRICS_FILE, PAGE_FILE, PICTURE_FILE, TABLE_FILE} if stage == STAGE else set()


def _came_back(done: Report, places: Places) -> bool:
    """Whether a file that the finished report lacked for its thumbnails is there now."""
    names = done.details.get("missing_pictures", [])
    return any((folder / name).is_file() for name in names for folder in (places.intermediates_dir, places.raw_dir))


def _write(folder: Path, evaluation: Evaluation, provenance: Provenance, confidence: float) -> None:
    write_json(folder / METRICS_FILE, metrics_record(evaluation, provenance))
    page = render_page(evaluation, json.loads(provenance.to_json()), confidence)
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")
    draw_summary(folder / PICTURE_FILE, evaluation.shown, confidence)
    (folder / TABLE_FILE).write_text(summary_markdown(evaluation, confidence), encoding="utf-8")


def _headline(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [row for split in evaluation.splits for row in split.headline()]


def _details(evaluation: Evaluation, places: Places) -> dict[str, Any]:
    details: dict[str, Any] = {
        "headline": _headline(evaluation),
        "notes": [f"{split.split}: {split.note}" for split in evaluation.splits if split.note],
        "missing_pictures": [],
    }
    if evaluation.pictures is not None:
        thumbnails = evaluation.pictures.thumbnails
        details["missing_pictures"] = list(thumbnails.missing)
        if thumbnails.reasons:
            details["notes"].append(
                f"{len(thumbnails.reasons)} pictures of the gallery are not shown "
                f"({'; '.join(sorted(set(thumbnails.reasons.values()))[:3])}); --intermediates and --raw name the "
                "folders they are read from"
            )
    if places.difficulty is None:
        details["notes"].append("no recall by difficulty band: --difficulty names the table it needs")
    if (shown := evaluation.shown) is not None:
        details["shown_split"] = shown.split
        if (found := shown.scores[PROJECTOR]["recall@1"]) is not None:
            details["recall@1"] = round(found.value, 6)
            details["recall@1 gain over backbone"] = round(shown.gains["recall@1"].value, 6)
    return details
