"""Stage `embed`: backbone features of every image of a tar.

Work is cut into pieces of some thousand rows. Each finished piece is a small parquet file in a dotted folder beside the
artifact, so a run that was killed goes on where it stopped; pieces hold whole batches, so that every image meets the
model in the same company and the resumed result is the same to the bit. Pieces are then strung together, row group by
row group, and the artifact appears at once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from spatial_core import schemas
from spatial_core.backbones.engine import FeatureBatch, Source, stream_features
from spatial_core.backbones.loading import Backbone, choose_device, load_source, matrix_products
from spatial_core.backbones.model_source import ModelSource, find_model
from spatial_core.backbones.preprocessing import load_preprocessing
from spatial_core.config.settings import Settings
from spatial_core.images.byte_ranges import TarImages
from spatial_core.interruption import resumable, stop_here
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.digests import digest_json
from spatial_core.storage.hardware import usable_cores
from spatial_core.storage.parquet import parquet_sink, read_columns
from spatial_core.storage.provenance import Provenance, artifact_digest, finished, record_artifact, stage_key
from spatial_core.street_view.embedding_pieces import Pieces, stored
from spatial_core.street_view.image_rows import (
    ALL_COLUMNS,
    LOCATORS,
    byte_readers,
    count_rows,
    require_same_key,
    row_blocks,
    unreadable,
)

STAGE = "embed"
CODE_VERSION = "1"
# What decides the numbers. The model's name may be a path of this machine: its id and revision stand for it.
_CONFIG = ("embedding_model.pooling_type", "embedding_model.precision", "embedding_model.vector_dtype")


def embed_tar(
    tar: Path, intermediates: Path, output_dir: Path, settings: Settings, progress: Progress = silent
) -> Report:
    """Write `output_dir/NNNN_embeddings.parquet`: the intermediates' rows, in their order, with an `embedding` each.

    Args:
        tar: the raw tar; not opened when the artifact is up to date.
        intermediates: its `NNNN.parquet`, in any folder.
        output_dir: where embeddings of all tars lie.
        settings: `embedding_model` and `infrastructure` (device, threads) are used; built-in models are written to
            `<data_dir>/backbones`.
        progress: called with images done, pieces of an earlier run included.

    Raises:
        ModelError: if the model cannot be had or loaded, does not fit in memory, or its options are not supported.
        InputError: if a file is missing, the intermediates are not called as the tar or belong to another one, or an
            image cannot be read.
        DigestMismatch: if the tar's bytes changed since it was ingested.
        ArtifactError: if the model gives a vector that is not finite.
        ArtifactBusy: if another process is writing the artifact.
        Interrupted: if this process was asked to stop; finished pieces are kept.
    """
    started = time.monotonic()
    require_same_key(intermediates, tar)
    artifact = output_dir / f"{intermediates.stem}_embeddings.parquet"
    section = settings.embedding_model
    device = choose_device(settings.infrastructure.device)
    source = find_model(
        section.model_name,
        section.revision,
        cache_dir=settings.locations.data_dir / "backbones",
        base_dir=settings.base_dir,
        trust_remote_code=section.trust_remote_code,
    )
    config = settings.pick(*_CONFIG)
    inputs = {"intermediates": artifact_digest(intermediates)}
    preprocessing_id = load_preprocessing(source.folder).id
    identity = {**config, "model": source.model_id, "revision": source.revision, "preprocessing": preprocessing_id}
    key = stage_key(STAGE, CODE_VERSION, identity, inputs)
    with exclusive(artifact), resumable():
        if (done := finished(artifact, key)) is not None:
            return done
        rows = count_rows(intermediates)
        backbone = _load(source, settings, device)
        # A piece holds whole batches, so that resuming does not change which images share one.
        piece_rows = -(-section.piece_rows // section.batch_size) * section.batch_size
        request = digest_json([key, section.batch_size, piece_rows])
        pieces = Pieces(artifact, request, piece_rows, rows, backbone.dim, section.vector_dtype)
        pieces.sweep(others_only=True)
        missing = pieces.missing()
        with TarImages(tar) as images, matrix_products(section.precision, device):
            run = _Run(tar, intermediates, images, pieces, backbone, settings, progress)
            run.compute(missing)
        provenance = Provenance(
            stage=STAGE,
            code_version=CODE_VERSION,
            config_digest=settings.digest,
            config=config,
            inputs=inputs,
            model=backbone.describe(),
            preprocessing=preprocessing_id,
        )
        _assemble(pieces, tar, intermediates, provenance)
        computed = sum(pieces.length(index) for index in missing)
        report = Report(
            stage=STAGE,
            artifact=artifact,
            rows=rows,
            rows_in=rows,
            kept=rows,
            seconds=time.monotonic() - started,
            bytes=artifact.stat().st_size,
            unit="images",
            details={
                "images_per_s": round(computed / run.seconds, 1) if computed else None,
                "device": str(device),
                "model": backbone.describe(),
                "batch_size_used": run.forward_size,
                "pieces": pieces.count,
                "pieces_resumed": pieces.count - len(missing),
            },
        )
        record_artifact(artifact, key, provenance, report)
        pieces.sweep(others_only=False)
    return report


def _load(source: ModelSource, settings: Settings, device: torch.device) -> Backbone:
    section = settings.embedding_model
    return load_source(
        source,
        device=device,
        precision=section.precision,
        pooling_type=section.pooling_type,
        trust_remote_code=section.trust_remote_code,
        compile_model=section.compile,
    )


@dataclass
class _Run:
    """Computes missing pieces; `seconds` and `forward_size` tell afterwards how it went."""

    tar: Path
    intermediates: Path
    images: TarImages
    pieces: Pieces
    backbone: Backbone
    settings: Settings
    progress: Progress
    seconds: float = 0.0
    forward_size: int = 0

    def compute(self, missing: list[int]) -> None:
        started = time.monotonic()
        infrastructure = self.settings.infrastructure
        done = self.pieces.total - sum(self.pieces.length(index) for index in missing)
        self.forward_size = self.settings.embedding_model.batch_size
        stream = stream_features(
            self.backbone.features,
            self.backbone.preprocessing,
            self._sources(missing),
            batch_size=self.settings.embedding_model.batch_size,
            threads=infrastructure.threads or usable_cores(),
            device=self.backbone.device,
        )
        with contextlib.closing(stream):
            for place, index in enumerate(missing):
                left = len(missing) - place
                stop_here(f"{self.pieces.count - left} of {self.pieces.count} pieces of {self.tar.name} are finished")
                parts: list[FeatureBatch] = []
                while sum(len(part.rows) for part in parts) < self.pieces.length(index):
                    batch = next(stream)
                    if batch.rejects:
                        self._refuse(batch)
                    parts.append(batch)
                    self.forward_size = min(self.forward_size, batch.forward_size)
                    done += len(batch.rows)
                    self.progress(done, self.pieces.total, f"{self.tar.name}: embeddings")
                vectors = np.concatenate([part.vectors for part in parts])
                first_row = int(parts[0].rows[0])
                self.pieces.write(index, stored(vectors, self.pieces.dtype, first_row, str(self.intermediates)))
        self.seconds = time.monotonic() - started

    def _sources(self, missing: list[int]) -> Iterator[tuple[int, Source]]:
        wanted = set(missing)
        blocks = row_blocks(self.intermediates, self.tar, LOCATORS, self.pieces.rows)
        for index, block in enumerate(blocks):
            if index in wanted:
                yield from enumerate(byte_readers(self.images, block), index * self.pieces.rows)

    def _refuse(self, batch: FeatureBatch) -> None:
        reject = batch.rejects[0]
        table = read_columns(self.intermediates, ["image_path", "image_offset"])
        raise unreadable(self.tar, table, reject.row, reject.detail)


def _assemble(pieces: Pieces, tar: Path, intermediates: Path, provenance: Provenance) -> None:
    """String the pieces together with the rows they belong to, one row group each."""
    schema = schemas.embeddings(pieces.dim, pieces.dtype)
    with parquet_sink(pieces.artifact, schema, provenance) as writer:
        for index, block in enumerate(row_blocks(intermediates, tar, ALL_COLUMNS, pieces.rows)):
            vectors = pieces.read(index)
            columns = [vectors if field.name == "embedding" else block.column(field.name) for field in schema]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
