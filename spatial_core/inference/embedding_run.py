"""One pass over a drop: the parts that are missing, decoded, embedded and written in file order.

Reading and decoding run ahead of the model; a part is written as soon as its last image has come back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from spatial_core.backbones.engine import FeatureBatch, Source, stream_features
from spatial_core.config.settings import Settings
from spatial_core.errors import InputError, ModelError, SpatialError
from spatial_core.images.decode import ImageError
from spatial_core.inference.dataset import REJECTS, DataSet, Part, PartSummary, Rejected, Totals, rejects_table
from spatial_core.inference.drop import ID_COLUMN, Chunk, image_buffers, read_chunks, validity
from spatial_core.inference.request import CODE_VERSION, STAGE, Request
from spatial_core.interruption import stop_here
from spatial_core.publishing.loading import PublishedModel, load_published
from spatial_core.report import Progress, Report
from spatial_core.storage.hardware import usable_cores
from spatial_core.storage.provenance import Provenance

_FILLER_ROW = -1


@dataclass
class _Plan:
    """A chunk being embedded.

    Args:
        chunk: which.
        ids: OSMIDs of its rows from `offset` on.
        offset: rows of the chunk that an earlier, limited run has done.
        slots: places in the image stream that have not come back yet; fillers count.
        rejected: rows without a vector so far, by place in `ids`.
        places: place in `ids` of every vector.
        vectors: as they come back.
    """

    chunk: Chunk
    ids: pa.ChunkedArray
    offset: int
    slots: int
    rejected: list[Rejected]
    places: list[npt.NDArray[np.int64]] = field(default_factory=list)
    vectors: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def take_in(self, batch: FeatureBatch) -> None:
        self.slots -= len(batch.rows) + len(batch.rejects)
        if len(batch.rows):
            self.places.append(batch.rows)
            self.vectors.append(batch.vectors)
        real = [reject for reject in batch.rejects if reject.row != _FILLER_ROW]
        self.rejected += [Rejected(reject.row, reject.reason, reject.detail) for reject in real]


class EmbeddingRun:
    """State of one pass; `prepare` finds out what is missing, `embed` makes it, `report` sums up the data set."""

    def __init__(
        self,
        *,
        dataset: DataSet,
        published: PublishedModel,
        request: Request,
        settings: Settings,
        read_batch_size: int,
        place: Path,
    ) -> None:
        self.dataset = dataset
        self._published = published
        self._request = request
        self._settings = settings
        self._read_batch_size = read_batch_size
        self._place = place
        self._chunks = request.drop.chunks(read_batch_size)
        self._done: dict[Chunk, PartSummary] = {}
        self._totals = Totals()
        self._last_written: str | None = None
        self._plans: deque[_Plan] = deque()
        for chunk in self._wanted():
            if (summary := dataset.read_summary(chunk)) is not None:
                self._count(chunk, summary)

    @classmethod
    def prepare(
        cls, root: Path, place: Path, state: Mapping[str, Any] | None, request: Request, settings: Settings
    ) -> EmbeddingRun:
        """Load the model and take stock of the parts in `root`, which will finally lie at `place`.

        Raises:
            ModelError: if the model changed since the request was read, and whatever `load_published` raises.
        """
        published = load_published(request.model, settings)
        if published.sha256 != request.model_sha256:
            raise ModelError(f"{request.model}: replaced while it was being loaded; run again")
        provenance = Provenance(
            stage=STAGE,
            code_version=CODE_VERSION,
            config_digest=settings.digest,
            config={"inference.filter_valid": request.filter_valid, "inference.precision": request.precision},
            inputs={"input": request.input_sha256, "model": request.model_sha256},
            model=published.identity,
            preprocessing=published.preprocessing.id,
        )
        dataset = DataSet(root, request.drop.id_type, published.embedding_dim, provenance)
        return cls(
            dataset=dataset,
            published=published,
            request=request,
            settings=settings,
            read_batch_size=settings.inference.read_batch_size if state is None else int(state["read_batch_size"]),
            place=place,
        )

    def embed(self, progress: Progress) -> None:
        """Make every missing part, then gather the rejects.

        Raises:
            InputError: if the drop is damaged; parts before that place are kept, and their rejects gathered.
            ModelError: if the model fails, or gives vectors that are not of unit length.
            Interrupted: if this process was asked to stop.
        """
        self._save_state()
        progress(self._totals.rows_in, self._request.rows, "embedding new images")
        stream = stream_features(
            self._published.embed,
            self._published.preprocessing,
            self._images(),
            batch_size=self._settings.inference.batch_size,
            threads=self._settings.infrastructure.threads or usable_cores(),
            device=self._published.device,
        )
        try:
            with _compute_threads(self._settings.infrastructure.threads), closing(stream):
                self._stop_if_asked()
                for batch in stream:
                    self._write_complete(progress)  # chunks without images have no batch of their own
                    self._plans[0].take_in(batch)
                    self._write_complete(progress)
            self._write_complete(progress)
        except SpatialError:
            self.dataset.write_rejects(self._chunks)
            raise
        self.dataset.write_rejects(self._chunks)
        self._save_state(finished=True)

    def require_vectors(self) -> None:
        """Refuse to call a data set without a single vector finished.

        Raises:
            InputError: if rows were read and all of them rejected; names the reasons and where they are listed.
        """
        if self._totals.rows_in and not self._totals.written:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self._rejected().items())
            raise InputError(
                f"{self._request.input_path}: none of {self._totals.rows_in} rows gives a vector ({reasons}); "
                f"each is listed in {self.dataset.root / REJECTS}"
            )

    def report(self, place: Path, seconds: float, note: str | None) -> Report:
        """The report on the whole data set, earlier runs included."""
        asked = self._settings.inference.read_batch_size
        notes = [note] if note else []
        if asked != self._read_batch_size:
            notes.append(
                f"read_batch_size stays {self._read_batch_size}, as this data set was begun, instead of {asked}"
            )
        return Report(
            stage=STAGE,
            artifact=place,
            rows=self._totals.written,
            rows_in=self._totals.rows_in,
            kept=self._totals.written,
            rejected=self._rejected(),
            seconds=seconds,
            bytes=sum(path.stat().st_size for path in place.rglob("*") if path.is_file()),
            unit="images",
            details={
                "drop": self._request.drop_record(),
                "total_rows_in_input": self._request.drop.rows,
                "parts": len(self._done),
                "read_batch_size": self._read_batch_size,
                "null_ids": self._totals.null_ids,
                "model": dict(self._published.identity),
                "device": str(self._published.device),
                "notes": notes,
            },
        )

    def _wanted(self) -> list[Chunk]:
        """Chunks within the limit; a drop without rows has one, which is empty."""
        return [chunk for chunk in self._chunks if chunk.first_row < self._request.rows] or self._chunks[:1]

    def _end(self, chunk: Chunk) -> int:
        """Rows of a chunk that are within the limit."""
        return min(chunk.rows, self._request.rows - chunk.first_row)

    def _images(self) -> Iterator[tuple[int, Source]]:
        """Images of the missing rows, chunk after chunk; runs in the reading thread.

        Every chunk is filled up to whole batches, so that a batch never holds images of two chunks: then no vector
        depends on which chunks an interrupted run had finished before.
        """
        size = self._settings.inference.batch_size
        rows_done = {chunk: self._done[chunk].rows_in if chunk in self._done else 0 for chunk in self._wanted()}
        missing = [chunk for chunk, rows in rows_done.items() if rows < self._end(chunk) or chunk not in self._done]
        for chunk, table in read_chunks(self._request.drop, missing, self._read_batch_size):
            offset = rows_done[chunk]
            rows = table.slice(offset, self._end(chunk) - offset)
            images, rejected = self._sort_rows(rows)
            fillers = -len(images) % size
            self._plans.append(_Plan(chunk, rows[ID_COLUMN], offset, len(images) + fillers, rejected))
            yield from images
            yield from ((_FILLER_ROW, _filler) for _ in range(fillers))

    def _sort_rows(self, rows: pa.Table) -> tuple[list[tuple[int, memoryview]], list[Rejected]]:
        """Divide rows into images to embed and rows that have none."""
        images: list[tuple[int, memoryview]] = []
        rejected: list[Rejected] = []
        filtering = self._request.filter_valid and self._request.drop.has_validity
        valid, unknown = validity(rows) if filtering else (np.ones(len(rows), bool), np.zeros(len(rows), bool))
        for place, data in enumerate(image_buffers(rows)):
            if unknown[place]:
                rejected.append(Rejected(place, "is_valid_null", "is_valid is null; only rows where it is true count"))
            elif not valid[place]:
                rejected.append(Rejected(place, "is_valid_false", "is_valid is false"))
            elif data is None:
                rejected.append(Rejected(place, "image_null", "image_bytes is null"))
            else:
                images.append((place, data))
        return images, rejected

    def _write_complete(self, progress: Progress) -> None:
        while self._plans and not self._plans[0].slots:
            plan = self._plans.popleft()
            self._count(plan.chunk, self.dataset.write_part(plan.chunk, self._assemble(plan)))
            self._save_state()
            progress(self._totals.rows_in, self._request.rows, "embedding new images")
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Stop between two parts, unless the last one is done."""
        if self._totals.rows_in < self._request.rows:
            stop_here(f"{self._totals.rows_in} of {self._request.rows} rows are embedded")

    def _assemble(self, plan: _Plan) -> Part:
        places = np.concatenate([np.empty(0, np.int64), *plan.places])
        vectors = np.concatenate([np.empty((0, self.dataset.dim), np.float32), *plan.vectors])
        rejects = rejects_table(self.dataset.id_type, plan.chunk, plan.ids, plan.rejected, plan.offset)
        part = Part(plan.ids.take(pa.array(places)), vectors, rejects, plan.offset + len(plan.ids))
        if not plan.offset:
            return part
        # The limit of an earlier run ended inside this chunk: its rows stay as they are.
        before = self.dataset.read_part(plan.chunk)
        return Part(
            pa.chunked_array([*before.ids.chunks, *part.ids.chunks], type=self.dataset.id_type),
            np.concatenate([before.vectors, part.vectors]),
            pa.concat_tables([before.rejects, part.rejects]),
            part.rows_in,
        )

    def _count(self, chunk: Chunk, summary: PartSummary) -> None:
        if (before := self._done.get(chunk)) is not None:
            self._totals.add(before, sign=-1)
        self._totals.add(summary)
        self._done[chunk] = summary
        self._last_written = chunk.name

    def _rejected(self) -> dict[str, int]:
        return {reason: count for reason, count in sorted(self._totals.rejected.items()) if count}

    def _save_state(self, *, finished: bool = False) -> None:
        self.dataset.write_state(
            {
                **self._request.state(),
                "output_dataset_dir": str(self._place.resolve()),
                "device": str(self._published.device),
                "batch_size": self._settings.inference.batch_size,
                "read_batch_size": self._read_batch_size,
                "embeddings_written": self._totals.written,
                "last_written_part": self._last_written,
                "rows_done": self._totals.rows_in,
                "rejected": self._rejected(),
                "null_ids": self._totals.null_ids,
                "finished": finished,
            }
        )


@contextmanager
def _compute_threads(count: int) -> Iterator[None]:
    """Let torch compute with `count` threads, 0 for as many as it likes."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _filler() -> bytes:
    raise ImageError("filler", "no image: fills the last batch of a chunk")
