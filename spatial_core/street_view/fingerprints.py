"""Stage `fingerprint`: the images of one tar -> `NNNN_fingerprints.parquet`, a small RGB thumbnail a row.

Images are read from the tar by the offset that ingest recorded, checked against the digest it recorded, decoded and
shrunk in threads. Rows and their order are those of the intermediates, all of whose columns are carried through. Ingest
has already refused what cannot be used, so here an image is never passed over or replaced: one that is not as ingest
saw it ends the stage, and nothing is published.

`exact` decodes every pixel; the thumbnails are within one grey level of Pillow's. `scaled` lets the decoder shrink in
the DCT domain first, which takes two thirds of the time and is up to three grey levels off on photographs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError, DigestMismatch, InputError
from spatial_core.images.byte_ranges import TarImages
from spatial_core.images.decode import ImageError, Pixels, decode_jpeg
from spatial_core.images.resize import resize_rgb
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.hardware import usable_cores
from spatial_core.storage.parquet import open_parquet, parquet_sink, read_columns, stream_batches, vectors_to_arrow
from spatial_core.storage.provenance import Provenance, artifact_digest, finished, record_artifact, stage_key
from spatial_core.street_view.image_rows import require_same_key
from spatial_core.street_view.member_checks import MemoryBudget

STAGE: Final = "fingerprint"
CODE_VERSION: Final = "1"
# Rows a row group, and held in memory: 12.6 MB of thumbnails at 16 x 16.
_GROUP_ROWS: Final = 16_384
# Images a thread takes at a time: enough that handing over costs nothing, few enough that no thread waits at the end.
_SLICE_ROWS: Final = 32
# In scaled decoding every thumbnail pixel still averages at least this many decoded pixels along each axis.
_SCALED_OVERSAMPLING: Final = 8
# What a pixel costs while it is decoded: three bytes of RGB, and as many again inside the decoder or the resampler.
_BYTES_PER_PIXEL: Final = 6


def fingerprint_tar(
    tar: Path, intermediates: Path, output_dir: Path, settings: Settings, progress: Progress = silent
) -> Report:
    """Take the fingerprint of every image of one tar.

    Args:
        tar: the tar that was ingested.
        intermediates: what ingest made of it, `NNNN.parquet` in any folder; its stem names the artifact.
        output_dir: folder of `NNNN_fingerprints.parquet` (`schemas.fingerprints`), vectors of image_size^2 x 3 uint8.
        settings: `fingerprints` and `infrastructure.threads` are used.
        progress: told images that are done, and their total.

    Returns:
        A report that counts rows; its details hold the decoding mode and images a second.

    Raises:
        InputError: if a file is missing, the intermediates are not called as the tar, have no rows or lack a column, or
            belong to another tar.
        TarError: if the tar is shorter than when it was ingested.
        DigestMismatch: if the intermediates, or an image inside the tar, changed since they were recorded.
        ArtifactError: if a column has another type, a page is damaged, or an image no longer decodes.
        ArtifactBusy: if another process is writing the same artifact.
    """
    require_same_key(intermediates, tar)
    rows = _check_rows(tar, intermediates)
    artifact = output_dir / f"{intermediates.stem}_fingerprints.parquet"
    config = settings.pick("fingerprints")
    inputs = {"intermediates": artifact_digest(intermediates)}
    key = stage_key(STAGE, CODE_VERSION, config, inputs)
    provenance = Provenance(STAGE, CODE_VERSION, settings.digest, config, inputs)
    size, mode = settings.fingerprints.image_size, settings.fingerprints.decode
    schema = schemas.fingerprints(size)
    with exclusive(artifact):
        if (done := finished(artifact, key)) is not None:
            return done
        start = time.monotonic()
        written = 0
        threads = settings.infrastructure.threads or usable_cores()
        with TarImages(tar) as images, parquet_sink(artifact, schema, provenance) as writer:
            shrink = partial(_shrink, images, MemoryBudget(), size, _SCALED_OVERSAMPLING * size * (mode == "scaled"))
            pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="fingerprint")
            try:
                for batch in stream_batches(intermediates, schemas.INTERMEDIATES.names, _GROUP_ROWS):
                    _check_complete(batch, intermediates)
                    pieces = []
                    for piece in pool.map(shrink, _slices(batch)):
                        pieces.append(piece)
                        written += len(piece)
                        progress(written, rows, f"{tar.name}: {written} fingerprints")
                    table = pa.Table.from_batches([batch]).add_column(
                        0, "fingerprint", vectors_to_arrow(np.concatenate(pieces))
                    )
                    writer.write_table(table.select(schema.names).cast(schema), row_group_size=_GROUP_ROWS)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        seconds = time.monotonic() - start
        report = Report(
            stage=STAGE,
            artifact=artifact,
            rows=written,
            rows_in=rows,
            kept=written,
            seconds=seconds,
            bytes=artifact.stat().st_size,
            details={"decode": mode, "image_size": size, "images_per_s": round(written / seconds, 1)},
        )
        record_artifact(artifact, key, provenance, report)
    return report


@dataclass(frozen=True)
class _Slice:
    """Where some images lie in the tar, as ingest recorded it."""

    offsets: Sequence[int]
    lengths: Sequence[int]
    widths: Sequence[int]
    heights: Sequence[int]
    digests: Sequence[str]

    def __len__(self) -> int:
        return len(self.offsets)


def _check_rows(tar: Path, intermediates: Path) -> int:
    """Rows of the intermediates, once they are known to be usable and to belong to this tar."""
    with open_parquet(intermediates, required=schemas.INTERMEDIATES.names) as file:
        schemas.require(file.schema_arrow, list(schemas.INTERMEDIATES), f"{intermediates}")
        rows: int = file.metadata.num_rows
    if not rows:
        raise InputError(f"{intermediates}: no rows, so nothing to fingerprint; rerun ingest on {tar.name}")
    for name in pc.unique(read_columns(intermediates, ["tar_file"])["tar_file"]).to_pylist():
        if name != tar.name:
            raise InputError(f"{intermediates}: rows of {name!r}, but the tar given is {tar}; give the one they name")
    return rows


def _check_complete(batch: pa.RecordBatch, intermediates: Path) -> None:
    for field in schemas.INTERMEDIATES:
        missing = 0 if field.nullable else batch.column(field.name).null_count
        if missing:
            raise ArtifactError(f"{intermediates}: column {field.name} is null in {missing} rows; rerun ingest")


def _slices(batch: pa.RecordBatch) -> Iterator[_Slice]:
    names = ("image_offset", "image_bytes", "image_width", "image_height", "image_sha256")
    columns = [batch.column(name).to_pylist() for name in names]
    for start in range(0, batch.num_rows, _SLICE_ROWS):
        yield _Slice(*(column[start : start + _SLICE_ROWS] for column in columns))


def _shrink(images: TarImages, budget: MemoryBudget, size: int, min_side_px: int, piece: _Slice) -> Pixels:
    """(N, size^2 x 3) uint8: the thumbnails of a slice, row-major H x W x C."""
    thumbnails = np.empty((len(piece), size * size * 3), np.uint8)
    for row, (offset, length) in enumerate(zip(piece.offsets, piece.lengths, strict=True)):
        with budget.hold(length + _BYTES_PER_PIXEL * piece.widths[row] * piece.heights[row]):
            try:
                data = images.verified(offset, length, piece.digests[row])
                pixels = decode_jpeg(data, min_side_px=min_side_px)
            except DigestMismatch as error:
                raise DigestMismatch(f"{error}: rerun ingest if the tar is right as it is") from error
            except ImageError as error:
                raise ArtifactError(
                    f"{images.path}: byte {offset}: the image of {length} bytes here no longer decodes "
                    f"({error.reason}: {error}); rerun ingest on {images.path.name}"
                ) from error
            thumbnails[row] = resize_rgb(pixels, size, size).reshape(-1)
    return thumbnails
