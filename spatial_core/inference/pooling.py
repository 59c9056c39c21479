"""One vector per building: the renormalised mean of its images' vectors, streamed over the parts of a data set.

The length of the mean before renormalising, `coherence`, says how far the images agree: 1 when they are identical,
about 1/sqrt(n) for n unrelated ones. Memory is one vector a building plus the identifiers; images are never held.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError, InputError
from spatial_core.inference.dataset import PARTS, dataset_folder, read_state
from spatial_core.inference.drop import ID_COLUMN
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.parquet import (
    open_parquet,
    parquet_sink,
    read_columns,
    read_provenance,
    vectors_to_arrow,
    vectors_to_numpy,
)
from spatial_core.storage.provenance import Provenance, artifact_digest, finished, record_artifact, stage_key

STAGE = "pool-buildings"
CODE_VERSION = "1"
# Below this the mean of unit vectors is rounding noise and has no direction.
MIN_COHERENCE = 1e-4
_WRITE_ROWS = 65_536
_NULL_ID = "osmid_null"
_CANCELLED = "vectors_cancel_out"


def pool_buildings(embeddings_dir: Path, output_file: Path, settings: Settings, progress: Progress = silent) -> Report:
    """Average the vectors of every OSMID.

    Args:
        embeddings_dir: a data set folder of `embed_parquet` (or the output file it is the sidecar of).
        output_file: parquet of `schemas.building_embeddings`, OSMIDs in order of first appearance.
        settings: the whole tree.
        progress: counts parts.

    Returns:
        A report in images: images without an OSMID, and those of buildings whose vectors cancel out, are rejected.

    Raises:
        InputError: if there is no finished data set.
        ArtifactError: if its parts are damaged or do not belong together.
    """
    started = time.monotonic()
    root = dataset_folder(embeddings_dir)
    parts = _finished_parts(root)
    inputs = {"embeddings": artifact_digest(root)}
    key = stage_key(STAGE, CODE_VERSION, {}, inputs)
    with exclusive(output_file):
        if (done := finished(output_file, key)) is not None:
            return done
        origin = _origin(parts)
        provenance = Provenance(
            stage=STAGE,
            code_version=CODE_VERSION,
            config_digest=settings.digest,
            inputs=inputs,
            model={} if origin is None else origin.model,
            preprocessing="" if origin is None else origin.preprocessing,
        )
        ids, codes = _encode_ids(parts)
        counts = np.bincount(codes[codes >= 0], minlength=len(ids))
        sums = _sum_vectors(parts, codes, len(ids), progress)
        # The sum's length over the count is the length of the mean.
        lengths = np.linalg.norm(sums, axis=1)
        coherence = lengths / np.maximum(counts, 1)
        kept = coherence >= MIN_COHERENCE
        schema = schemas.building_embeddings(ids.type, sums.shape[1])
        with parquet_sink(output_file, schema, provenance) as writer:
            for start in range(0, len(ids), _WRITE_ROWS):
                block = start + np.flatnonzero(kept[start : start + _WRITE_ROWS])
                columns = [
                    ids.take(pa.array(block)),
                    vectors_to_arrow((sums[block] / lengths[block, None]).astype(np.float32)),
                    pa.array(counts[block].astype(np.int64)),
                    pa.array(coherence[block].astype(np.float32)),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=writer.schema))
        rejected = {_NULL_ID: int((codes < 0).sum()), _CANCELLED: int(counts[~kept].sum())}
        report = Report(
            stage=STAGE,
            artifact=output_file,
            rows=int(kept.sum()),
            rows_in=len(codes),
            kept=int(counts[kept].sum()),
            rejected={reason: count for reason, count in rejected.items() if count},
            seconds=time.monotonic() - started,
            bytes=output_file.stat().st_size,
            unit="images",
            details=_figures(ids, counts, coherence, kept),
        )
        record_artifact(output_file, key, provenance, report)
    return report


def _finished_parts(root: Path) -> list[Path]:
    state = read_state(root)
    parts = sorted((root / PARTS).glob("rg*_rb*.parquet"))
    if state is None or not parts:
        raise InputError(f"{root}: no data set of embeddings (state.json and parts/); make it with `spatial embed-new`")
    # Data sets of the earlier pipeline do not say whether they are complete.
    if not state.get("finished", True):
        raise InputError(
            f"{root}: unfinished, {state.get('rows_done')} of {state.get('total_rows_in_input')} rows done; "
            f"run `spatial embed-new` on {state.get('input_path')} again"
        )
    return parts


def _origin(parts: Sequence[Path]) -> Provenance | None:
    """Provenance of the parts; None for a data set of the earlier pipeline."""
    origins = [read_provenance(part) for part in parts]
    models = {tuple(sorted(origin.model.items())) for origin in origins if origin is not None}
    if len(models) > 1 or (models and None in origins):
        raise ArtifactError(f"{parts[0].parent}: parts made by different models; delete the folder and embed again")
    return origins[0]


def _encode_ids(parts: Sequence[Path]) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """(distinct OSMIDs in order of first appearance, code of every image's OSMID, -1 where it is null)."""
    columns = [read_columns(part, [ID_COLUMN])[ID_COLUMN] for part in parts]
    kinds = {column.type for column in columns}
    if len(kinds) > 1:
        raise ArtifactError(f"{parts[0].parent}: OSMID has several types: {', '.join(sorted(map(str, kinds)))}")
    kind = columns[0].type
    chunks = [chunk for column in columns for chunk in column.chunks]
    encoded = pc.dictionary_encode(pa.chunked_array([_plain(chunk) for chunk in chunks], _plain_type(kind)))
    encoded = encoded.unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # without any chunk there is nothing to combine
        return pa.array([], kind), np.empty(0, np.int64)
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    return _restore(encoded.dictionary, kind), codes


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return kind.value_type
    return pa.float32() if pa.types.is_float16(kind) else kind


def _plain(chunk: pa.Array) -> pa.Array:
    """Values of a type that can be grouped: no extension, dictionary or half precision."""
    if isinstance(chunk, pa.ExtensionArray):
        chunk = chunk.storage
    return chunk.cast(_plain_type(chunk.type))


def _restore(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        return kind.wrap_array(_restore(values, kind.storage_type))
    if pa.types.is_dictionary(kind):
        return values.dictionary_encode().cast(kind)
    return values.cast(kind)


def _sum_vectors(
    parts: Sequence[Path], codes: npt.NDArray[np.int64], buildings: int, progress: Progress
) -> npt.NDArray[np.float64]:
    """(buildings, D) sums of the vectors of every code; images without a code are left out."""
    sums: torch.Tensor | None = None
    start = 0
    for number, part in enumerate(parts):
        kind = open_parquet(part, required=["embedding"]).schema_arrow.field("embedding").type
        vectors = vectors_to_numpy(read_columns(part, ["embedding"])["embedding"])
        width = kind.list_size if pa.types.is_fixed_size_list(kind) else vectors.shape[1]
        progress(number + 1, len(parts), "pooling buildings")
        if not width:  # an empty part of the earlier pipeline, whose lists have no width of their own
            continue
        if not np.isfinite(vectors).all():
            raise ArtifactError(f"{part}: vectors that are not finite; run `spatial embed-new` again")
        if sums is None:
            sums = torch.zeros(buildings, width, dtype=torch.float64)
        if width != sums.shape[1]:
            raise ArtifactError(f"{part}: vectors {width} wide among others {sums.shape[1]} wide")
        own = codes[start : start + len(vectors)]
        named = own >= 0
        sums.index_add_(0, torch.from_numpy(own[named]), torch.from_numpy(vectors[named]).double())
        start += len(vectors)
    if sums is None:
        raise ArtifactError(f"{parts[0].parent}: no part has vectors, or says how wide they would be")
    return sums.numpy()


def _figures(
    ids: pa.Array, counts: npt.NDArray[np.int64], coherence: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    shared = kept & (counts > 1)
    return {
        "buildings_with_several_images": int(shared.sum()),
        "median_coherence_of_those": float(np.median(coherence[shared])) if shared.any() else None,
        "cancelled_buildings": [str(ids[int(place)]) for place in np.flatnonzero(~kept)[:10]],
    }
