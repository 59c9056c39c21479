"""Stage `difficulty`: fingerprints of all tars -> for every image its most similar images of other buildings, by band.

What the earlier pipeline calls compute_visual_neighbors: principal components of the fingerprints, the nearest images
of other buildings, and seven bands of distance relative to each image's surroundings, 0 hardest. New is a minimum
distance on the ground between an image's building and its neighbours' (`data.min_negative_distance_m`, 0 = off and
then the neighbours are the earlier pipeline's).

An image with fewer neighbours than asked for has shorter lists, and one without any has empty ones (a data set of one
building, or of buildings all nearer than the minimum distance); training then draws a random other building for it.

Search is exact through torch and faiss on a CPU and torch on a GPU, or approximate (`data.search`, or on a CPU beyond
`data.search_exact_rows` images); the method and its measured recall are in the file's metadata.

Memory: 290 bytes an image (its components twice, id and building), 30 bytes a building, about 0.6 GB for the lists of a
row group on their way into the file, and as much again where lists are few enough to be kept after calibration.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.report import Progress, Report, silent
from spatial_core.retrieval.approximate import ApproximateSearch
from spatial_core.retrieval.search import ExactSearch
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.parquet import parquet_sink
from spatial_core.storage.provenance import Provenance, artifact_digest, finished, record_artifact, stage_key
from spatial_core.street_view import bands
from spatial_core.street_view.fingerprint_files import Images, list_fingerprints, read_images
from spatial_core.street_view.visual_neighbours import MARGIN, NeighbourFinder, Neighbours, Search, joined
from spatial_core.street_view.visual_space import VisualSpace, project

STAGE = "difficulty"
CODE_VERSION = "2"
_CONFIG = (
    "global.seed",
    "data.neighbors",
    "data.k0_for_local_scale",
    "data.sample_fraction_for_bands",
    "data.pca_components",
    "data.min_negative_distance_m",
    "data.search",
    "data.search_exact_rows",
    "infrastructure.distance_dtype",
    "infrastructure.row_group_size",
)
_HELD_ENTRIES = 16 << 20  # neighbours kept from calibration to writing, 12 bytes each
_GROUP_ENTRIES = 16 << 20  # neighbours a row group, at most
_BLOCK_ANCHORS = 8192  # between two calls of progress

Find = Callable[[int, int], Neighbours]


def compute_difficulty(
    fingerprints_dir: Path, output_file: Path, settings: Settings, progress: Progress = silent
) -> Report:
    """Neighbours and difficulty bands of every image with a fingerprint.

    Args:
        fingerprints_dir: folder of `*_fingerprints.parquet`.
        output_file: parquet file to write, columns `schemas.DIFFICULTY`, one row an image in the order of the inputs.
        settings: `data` and `infrastructure`.
        progress: called with images searched.

    Returns:
        Report in images.

    Raises:
        InputError: if there are no fingerprints.
        ArtifactError: on missing, malformed or repeated ids, malformed fingerprints, or files made differently.
        ModelError: if the device does not exist here.
    """
    started = time.perf_counter()
    fingerprints = list_fingerprints(fingerprints_dir)
    digests = {path.name: artifact_digest(path) for path in fingerprints.paths}
    config = settings.pick(*_CONFIG)
    key = stage_key(STAGE, CODE_VERSION, config, digests)
    with exclusive(output_file):
        if (done := finished(output_file, key)) is not None:
            return done
        data = settings.data
        progress(0, fingerprints.rows, "reading ids")
        images = read_images(fingerprints.paths, with_places=data.min_negative_distance_m > 0)
        progress(0, fingerprints.rows, f"projecting on {data.pca_components} components")
        space = project(fingerprints, data.pca_components, settings.seed)
        progress(0, fingerprints.rows, "preparing the search")
        search, method = _searcher(space.scores, settings)
        finder = NeighbourFinder(
            search,
            space.scores,
            images,
            neighbors=data.neighbors,
            min_distance_m=data.min_negative_distance_m,
            dtype=settings.infrastructure.distance_dtype,
            block=settings.infrastructure.batch_size,
        )
        find, edges = _calibrate(finder, len(images), settings, progress)
        provenance = Provenance(
            STAGE, CODE_VERSION, settings.digest, config, digests, preprocessing=fingerprints.preprocessing
        )
        schema = schemas.DIFFICULTY.with_metadata(_file_metadata(settings, space, edges, method))
        with parquet_sink(output_file, schema, provenance) as writer:
            counts = _Counts()
            group = max(1, min(settings.infrastructure.row_group_size, _GROUP_ENTRIES // data.neighbors))
            for first in range(0, len(images), group):
                last = min(first + group, len(images))
                neighbours = find(first, last)
                table, band = _table(images, first, neighbours, edges, data.k0_for_local_scale)
                writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=group)
                counts.add(neighbours, band, data.neighbors)
                progress(last, len(images), "writing neighbours")
            writer.add_key_value_metadata({"excluded_near": str(counts.excluded)})
        report = Report(
            stage=STAGE,
            artifact=output_file,
            rows=len(images),
            rows_in=len(images),
            kept=len(images),
            seconds=time.perf_counter() - started,
            bytes=output_file.stat().st_size,
            unit="images",
            details={
                **counts.to_json(),
                **method,
                "band_edges": edges.tolist(),
                "buildings": len(images.building_ids),
                "blank_fingerprints": space.blank,
                "pca_components": space.scores.shape[1],
                "pca_explained_variance": space.explained,
            },
        )
        record_artifact(output_file, key, provenance, report)
    return report


def _searcher(scores: npt.NDArray[np.float32], settings: Settings) -> tuple[Search, dict[str, Any]]:
    """The search that the settings ask for, and how it is described in the file."""
    data, infrastructure = settings.data, settings.infrastructure
    device = _device(infrastructure.device)
    exact = data.search == "exact" or (
        data.search == "auto" and (device != "cpu" or len(scores) <= data.search_exact_rows)
    )
    if exact:
        return ExactSearch(scores, device=device, threads=infrastructure.threads), {
            "search_method": "exact",
            "search_recall": 1.0,
            "search_recall_queries": 0,
        }
    index = ApproximateSearch(scores, data.neighbors + MARGIN, threads=infrastructure.threads, seed=settings.seed)
    return index, {
        "search_method": f"ivf_flat groups={index.groups} probes={index.probes}",
        "search_recall": index.recall,
        "search_recall_queries": index.sample,
    }


def _device(name: str) -> str:
    if name == "cpu":
        return name
    from spatial_core.backbones.loading import choose_device

    return str(choose_device(name))


def _calibrate(
    finder: NeighbourFinder, count: int, settings: Settings, progress: Progress
) -> tuple[Find, npt.NDArray[np.float64]]:
    """Band edges, and how to find the neighbours of images `first` to `last`.

    The neighbours of all images are kept from here on where they are few enough; otherwise those of the calibrating
    images alone are searched for, and once more when it is their turn: 3 % more work.
    """
    data = settings.data

    def search(first: int, last: int) -> Neighbours:
        parts = []
        for start in range(first, last, _BLOCK_ANCHORS):
            stop = min(start + _BLOCK_ANCHORS, last)
            parts.append(finder.find(np.arange(start, stop)))
            progress(stop, count, "searching neighbours")
        return joined(parts)

    anchors = bands.calibration_anchors(count, data.sample_fraction_for_bands, settings.seed)
    find: Find = search
    if count * data.neighbors <= _HELD_ENTRIES:
        every = search(0, count)
        sample = every if len(anchors) == count else every.pick(anchors)
        find = every.part
    else:
        progress(0, count, f"calibrating on {len(anchors)} images")
        sample = finder.find(anchors)
    edges = bands.band_edges(bands.distance_ratios(sample.distances, sample.offsets, data.k0_for_local_scale))
    return find, edges


def _table(
    images: Images, first: int, neighbours: Neighbours, edges: npt.NDArray[np.float64], k0: int
) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """Rows of the file for consecutive images from `first` on, and the band of every neighbour."""
    band = bands.assign_bands(bands.distance_ratios(neighbours.distances, neighbours.offsets, k0), edges)
    offsets = pa.array(neighbours.offsets, pa.int32())
    lists = [
        images.building_ids.take(pa.array(images.building[neighbours.rows])),
        pa.array(neighbours.distances.astype(np.float64, copy=False)),
        pa.array(band),
    ]
    columns = [
        images.ids.slice(first, len(neighbours)).combine_chunks(),
        *(pa.ListArray.from_arrays(offsets, values) for values in lists),
    ]
    return pa.table(columns, schema=schemas.DIFFICULTY), band


def _file_metadata(
    settings: Settings, space: VisualSpace, edges: npt.NDArray[np.float64], method: Mapping[str, Any]
) -> dict[str, str]:
    """The earlier pipeline's keys, then ours."""
    data = settings.data
    return {
        "neighbors": str(data.neighbors),
        "k0_for_local_scale": str(data.k0_for_local_scale),
        "sample_fraction_for_bands": str(data.sample_fraction_for_bands),
        "band_edges": json.dumps(edges.tolist()),
        "distance_metric": "euclidean_visual",
        "pca_components": str(space.scores.shape[1]),
        "min_negative_distance_m": f"{data.min_negative_distance_m:g}",
        **{name: str(value) for name, value in method.items()},
    }


class _Counts:
    """What the report says about the lists."""

    def __init__(self) -> None:
        self.excluded = 0
        self._neighbours = 0
        self._none = 0
        self._short = 0
        self._bands = np.zeros(bands.BANDS, np.int64)

    def add(self, lists: Neighbours, band: npt.NDArray[np.int64], wanted: int) -> None:
        lengths = np.diff(lists.offsets)
        self.excluded += int(lists.excluded.sum())
        self._neighbours += int(lengths.sum())
        self._none += int(np.count_nonzero(lengths == 0))
        self._short += int(np.count_nonzero(lengths < wanted))
        self._bands += np.bincount(band, minlength=bands.BANDS)

    def to_json(self) -> dict[str, Any]:
        return {
            "neighbours": self._neighbours,
            "images_without_neighbours": self._none,
            "images_with_fewer_neighbours": self._short,
            "excluded_near": self.excluded,
            "band_counts": self._bands.tolist(),
        }
