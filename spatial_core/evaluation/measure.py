"""All measurements of an evaluation, one split in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError, ModelError
from spatial_core.evaluation.bands import PAIRS, RECALL, band_breakdowns, read_look_alikes
from spatial_core.evaluation.breakdowns import angle_breakdown, distance_breakdown, views_breakdown
from spatial_core.evaluation.gallery import Gallery, choose_examples
from spatial_core.evaluation.results import Breakdown, SplitResult
from spatial_core.evaluation.scores import Intervals, Queries, run_queries, score_methods
from spatial_core.evaluation.space_map import SpaceMap, map_spaces
from spatial_core.evaluation.spaces import BACKBONE, PROJECTOR, PcaModel, build_spaces, fit_pca
from spatial_core.evaluation.split_data import SplitData, read_split, row_count
from spatial_core.evaluation.thumbnails import Thumbnails, read_thumbnails
from spatial_core.metric_learning.checkpoint import Checkpoint
from spatial_core.report import Progress
from spatial_core.retrieval.metrics import select_queries
from spatial_core.storage.parquet import read_provenance

PCA_DIMENSIONS = 256
# The test split is shown in pictures; val stands in where test is too small.
SPLITS = ("test", "val")


@dataclass(frozen=True)
class Places:
    """What an evaluation reads.

    Args:
        merged_dir: folder of train.parquet, val.parquet and test.parquet.
        difficulty: difficulty table; None leaves the breakdown by band out.
        intermediates_dir: folder of NNNN.parquet, for thumbnails.
        raw_dir: folder of the tars, for thumbnails.
    """

    merged_dir: Path
    difficulty: Path | None
    intermediates_dir: Path
    raw_dir: Path


@dataclass(frozen=True)
class Pictures:
    """What is looked at rather than measured, of one split.

    Args:
        gallery: right and wrong retrievals.
        thumbnails: pictures of the gallery's images.
        space_map: positions in the backbone's and the projector's space; None where there are too few images.
        building_of: building id by number, for the map's marks.
    """

    gallery: Gallery
    thumbnails: Thumbnails
    space_map: SpaceMap | None
    building_of: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """Everything a report is made of.

    Args:
        splits: test, then val.
        pictures: of the first split that had queries; None where none had.
        pca: the principal components, None when there was no training image.
        checkpoint: the head that was measured.
    """

    splits: tuple[SplitResult, ...]
    pictures: Pictures | None
    pca: PcaModel | None
    checkpoint: Checkpoint

    @property
    def images(self) -> int:
        """Images of both splits."""
        return sum(split.images for split in self.splits)

    @property
    def shown(self) -> SplitResult | None:
        """The split that headlines the report: the first that was measured."""
        return next((split for split in self.splits if split.queries), None)


def measure(places: Places, checkpoint: Checkpoint, settings: Settings, progress: Progress) -> Evaluation:
    """Evaluate a head on val and test.

    Raises:
        InputError: if the training split, or a column, is missing.
        ArtifactError: if a file is damaged.
        ModelError: if the head belongs to other features than those of the splits.
        ConfigError: if the device does not exist.
    """
    device = _device(settings)
    train = places.merged_dir / "train.parquet"
    progress(0, len(SPLITS) + 1, "principal components of the training features")
    pca = fit_pca(train, PCA_DIMENSIONS) if row_count(train) else None
    results: list[SplitResult] = []
    pictures: Pictures | None = None
    for number, name in enumerate(SPLITS, start=1):
        progress(number, len(SPLITS) + 1, f"{name} split")
        path = places.merged_dir / f"{name}.parquet"
        if not path.is_file():
            results.append(SplitResult(name, 0, 0, note=f"there is no {path.name}: the split has no images"))
            continue
        refuse_other_features(path, checkpoint)
        split = read_split(path, name)
        queries = _queries(split, settings)
        if queries is None:
            results.append(SplitResult(name, len(split), len(split.buildings), note=_too_small(split)))
            continue
        spaces = build_spaces(split, checkpoint.projector, pca, device, settings.seed)
        outcome = run_queries(spaces, split.labels, queries, device)
        results.append(_score(split, spaces, outcome, places, settings))
        if pictures is None:
            progress(number, len(SPLITS) + 1, f"{name} split: gallery and map")
            pictures = _pictures(split, spaces, outcome, places, settings)
    return Evaluation(tuple(results), pictures, pca, checkpoint)


def refuse_other_features(split: Path, checkpoint: Checkpoint) -> None:
    """Compare the backbone that a head was trained on with that of a split, where both are recorded.

    Raises:
        ModelError: if they differ.
    """
    provenance = read_provenance(split)
    ours = (dict(checkpoint.backbone.model), checkpoint.backbone.preprocessing)
    theirs = ({}, "") if provenance is None else (dict(provenance.model), provenance.preprocessing)
    for what, trained, found in zip(("features of", "preprocessing"), ours, theirs, strict=True):
        if trained and found and trained != found:
            raise ModelError(f"{split}: holds {what} {found}, the projector was trained on {trained}")


def _queries(split: SplitData, settings: Settings) -> Tensor | None:
    config = settings.evaluation
    queries = select_queries(split.labels, config.max_queries, config.per_building_limit, settings.seed)
    return queries if len(queries) and len(split.buildings) > 1 else None


def _too_small(split: SplitData) -> str:
    return (
        f"not enough buildings: a query needs another image of its building and one of another building to tell it "
        f"from, and this split has {len(split)} images of {len(split.buildings)} buildings"
    )


def _score(
    split: SplitData, spaces: Mapping[str, Tensor], queries: Queries, places: Places, settings: Settings
) -> SplitResult:
    config = settings.evaluation
    intervals = Intervals(config.bootstrap_samples, config.confidence, settings.seed)
    found = score_methods(queries, len(split), intervals)
    if places.difficulty is None:
        bands = tuple(Breakdown(name, note="no difficulty table was given") for name in (RECALL, PAIRS))
    else:
        look_alikes = read_look_alikes(places.difficulty, split, queries.rows)
        bands = band_breakdowns(look_alikes, split, spaces, queries, intervals)
    return SplitResult(
        split=split.name,
        images=len(split),
        buildings=len(split.buildings),
        queries=len(queries.rows),
        query_buildings=len(set(queries.buildings.tolist())),
        scores=found.scores,
        gains=found.gains,
        curves=found.curves,
        curve_k=found.curve_k,
        breakdowns=(
            *bands,
            angle_breakdown(split, queries, intervals),
            distance_breakdown(split, queries, intervals),
            views_breakdown(split, queries, intervals),
        ),
        near_training=near_training(places.merged_dir, split.name),
    )


def near_training(merged_dir: Path, split: str) -> float | None:
    """What `merge` recorded: the share of a split's buildings within 25 m of a training building, if it did."""
    path = merged_dir / "report.json"
    if not path.is_file():
        return None
    try:
        share = json.loads(path.read_bytes())["leakage"][split]["share_within_25m"]
    except (ValueError, KeyError, TypeError):  # another program's report.json
        return None
    return round(float(share), 6)


def _pictures(
    split: SplitData, spaces: Mapping[str, Tensor], queries: Queries, places: Places, settings: Settings
) -> Pictures:
    config = settings.evaluation
    gallery = choose_examples(split, spaces[PROJECTOR], queries, config.gallery_queries, settings.seed)
    rows = gallery.rows
    return Pictures(
        gallery=gallery,
        thumbnails=read_thumbnails(
            [split.images[row].as_py() for row in rows],
            split.datasets[rows].tolist(),
            places.intermediates_dir,
            places.raw_dir,
        ),
        space_map=map_spaces(
            {name: spaces[name] for name in (BACKBONE, PROJECTOR)}, split.labels, config.map_points, settings.seed
        ),
        building_of=tuple(split.buildings.to_pylist()),
    )


def _device(settings: Settings) -> torch.device:
    wanted = settings.infrastructure.device
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"infrastructure.device is {wanted!r}; it must be auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"infrastructure.device is {wanted!r}, but torch finds no CUDA device; use auto or cpu")
    return device
