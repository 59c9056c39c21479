"""The features of one split, where training can index them: on the device, in memory, or memory-mapped.

Vectors keep the type they are stored in (float16 or float32; list<double> of the earlier pipeline becomes float32) and
are streamed from parquet into their place, never through pandas. Labels are numbers in the order of the sorted
building ids, so they do not depend on the order of rows.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from spatial_core.errors import ArtifactError, InputError
from spatial_core.geo.sphere import check_degrees, unit_vectors
from spatial_core.metric_learning.checkpoint import Backbone
from spatial_core.storage.hardware import available_memory
from spatial_core.storage.parquet import open_parquet, read_columns, read_provenance, stream_batches, vectors_to_numpy

_BLOCK_BYTES = 32 << 20
# Shares of what is free that features may take; the rest is for the head, its gradients and the page cache.
_DEVICE_SHARE = 0.6
_HOST_SHARE = 0.5
_IDS = ["building_id", "streetview_image_id"]
_PLACE = ["target_lat", "target_lon"]


@dataclass(frozen=True)
class Sample:
    """Which buildings of a split to load: all, a share, or a number of them (which wins), chosen by the seed."""

    fraction: float | None = None
    buildings: int | None = None
    seed: int = 0

    def choose(self, total: int) -> npt.NDArray[np.bool_]:
        """(total,) whether each building is loaded; two at least are, as far as there are two."""
        if self.buildings is not None:
            wanted = self.buildings
        else:
            wanted = total if self.fraction is None else int(total * self.fraction)
        chosen = np.zeros(total, dtype=np.bool_)
        chosen[np.random.default_rng(self.seed).permutation(total)[: max(2, wanted)]] = True
        return chosen


@dataclass(frozen=True)
class Split:
    """One split, loaded.

    Args:
        path: the file.
        values: (N, D) features, float16 or float32, on `device` or on the host.
        device: where training happens, and where `take` puts rows.
        label: (N,) building of each row.
        image_ids: (N,) streetview_image_id.
        building_ids: (B,) building_id by label.
        positions: (B, 3) unit vectors of the buildings' places; None where the file has no coordinates.
        rows_in_file: rows before sampling.
        buildings_in_file: buildings before sampling.
        placed: where `values` lie: `device`, `memory` or `disk`.
    """

    path: Path
    values: Tensor
    device: torch.device
    label: npt.NDArray[np.int64]
    image_ids: pa.Array
    building_ids: pa.Array
    positions: npt.NDArray[np.float64] | None
    rows_in_file: int
    buildings_in_file: int
    placed: str

    @property
    def dim(self) -> int:
        return int(self.values.shape[1])

    @property
    def has_partner(self) -> npt.NDArray[np.bool_]:
        """(N,) whether another image of the row's building is loaded."""
        return np.bincount(self.label, minlength=len(self.building_ids))[self.label] > 1

    @property
    def can_form_triplets(self) -> bool:
        """Whether there are two buildings, and one of them has two images."""
        return len(self.building_ids) > 1 and bool(self.has_partner.any())

    def take(self, rows: Tensor) -> Tensor:
        """(R,) rows on the training device -> (R, D) float32 features there."""
        if self.values.device == self.device:
            return self.values[rows].float()
        return self.values[rows.cpu()].to(self.device).float()


def load_split(
    path: Path,
    device: torch.device,
    scratch: Path,
    sample: Sample | None = None,
    *,
    host_budget: int | None = None,
) -> Split:
    """Load ids, labels and features of a split.

    Args:
        path: split parquet.
        device: training device.
        scratch: folder for a memory-mapped file, when neither the device nor memory has room. The file has no name by
            the time it is used, so nothing is left behind, whatever ends the process.
        sample: which buildings; None = all.
        host_budget: bytes of host memory features may take; default half of what is free.

    Raises:
        InputError: if the file is missing, lacks a column, or there is no room for its features.
        ArtifactError: if ids are null, or vectors are null, of different lengths or not finite.
    """
    file = open_parquet(path, [*_IDS, "embedding"])
    has_place = all(name in file.schema_arrow.names for name in _PLACE)
    table = read_columns(path, _IDS + (_PLACE if has_place else []))
    for name in _IDS:
        if table[name].null_count:
            raise ArtifactError(f"{path}: {table[name].null_count} rows without {name}; rebuild it with stage 'merge'")
    names = table["building_id"].cast(pa.string()).combine_chunks()
    building_ids = pc.unique(names).sort()
    label = np.asarray(pc.index_in(names, value_set=building_ids), dtype=np.int64)
    total = len(building_ids)
    rows: npt.NDArray[np.bool_] = np.ones(len(label), dtype=np.bool_)
    if sample is not None:
        chosen = sample.choose(total)
        rows = chosen[label]
        label = (np.cumsum(chosen) - 1)[label[rows]]
        building_ids = building_ids.filter(pa.array(chosen))
        table = table.filter(pa.array(rows))
    values, placed = _load_features(path, rows, device, scratch, host_budget)
    return Split(
        path=path,
        values=values,
        device=device,
        label=label,
        image_ids=table["streetview_image_id"].cast(pa.string()).combine_chunks(),
        building_ids=building_ids,
        positions=_positions(path, table, label, len(building_ids)) if has_place else None,
        rows_in_file=len(rows),
        buildings_in_file=total,
        placed=placed,
    )


def read_backbone(path: Path) -> Backbone:
    """Where a split's features came from, from its footer; empty for a file of another program."""
    provenance = read_provenance(path)
    if provenance is None:
        return Backbone()
    model: Mapping[str, str] = provenance.model
    return Backbone(dict(model), provenance.preprocessing)


def _positions(
    path: Path, table: pa.Table, label: npt.NDArray[np.int64], buildings: int
) -> npt.NDArray[np.float64] | None:
    """Place of each building, that of its first row: all images of a facade point carry its coordinates."""
    lat, lon = (np.asarray(table[name].cast(pa.float64()), dtype=np.float64) for name in _PLACE)
    wrong = check_degrees(lat, lon)
    if len(wrong):
        at = int(wrong[0])
        raise ArtifactError(f"{path}: {len(wrong)} rows are nowhere on earth, first at {lat[at]}, {lon[at]}")
    first = np.zeros(buildings, dtype=np.int64)
    first[label[::-1]] = np.arange(len(label))[::-1]
    return unit_vectors(lat[first], lon[first]) if buildings else None


def _load_features(
    path: Path, chosen: npt.NDArray[np.bool_], device: torch.device, scratch: Path, host_budget: int | None
) -> tuple[Tensor, str]:
    values: Tensor | None = None
    placed = "memory"
    line = filled = 0
    for batch in stream_batches(path, ["embedding"], _block_rows(path)):
        matrix = _vectors(path, batch, line)[chosen[line : line + len(batch)]]
        line += len(batch)
        if not np.isfinite(matrix).all():
            raise ArtifactError(
                f"{path}: features that are not finite before row {line}; rebuild it with stage 'merge'"
            )
        if values is None:
            values, placed = _allocate(int(chosen.sum()), matrix, device, scratch, host_budget)
        if matrix.shape[1] != values.shape[1]:
            raise ArtifactError(f"{path}: features of {matrix.shape[1]} and of {values.shape[1]} values")
        values[filled : filled + len(matrix)] = torch.from_numpy(matrix)
        filled += len(matrix)
    return (torch.empty(0, 0), placed) if values is None else (values, placed)


def _block_rows(path: Path) -> int:
    kind = open_parquet(path).schema_arrow.field("embedding").type
    width = kind.list_size * 4 if pa.types.is_fixed_size_list(kind) else 32_768
    return max(1, _BLOCK_BYTES // width)


def _vectors(path: Path, batch: pa.RecordBatch, line: int) -> npt.NDArray[Any]:
    try:
        matrix = vectors_to_numpy(batch.column(0))
    except ArtifactError as error:
        raise ArtifactError(f"{path}: rows {line} to {line + len(batch)}: {error}") from error
    return matrix if matrix.dtype == np.float16 else matrix.astype(np.float32, copy=False)


def _allocate(
    rows: int, like: npt.NDArray[Any], device: torch.device, scratch: Path, host_budget: int | None
) -> tuple[Tensor, str]:
    """An (rows, D) matrix of the type of `like`: on the device if it fits, else in memory, else on disk."""
    dim, dtype = like.shape[1], torch.from_numpy(like[:0]).dtype
    size = rows * dim * like.itemsize
    if device.type == "cuda" and size < _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return torch.empty(rows, dim, dtype=dtype, device=device), "device"
    if size <= (_HOST_SHARE * available_memory() if host_budget is None else host_budget):
        return torch.empty(rows, dim, dtype=dtype), "memory"
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f".features-{uuid.uuid4().hex[:8]}"
    try:
        with path.open("wb") as handle:
            # Reserved now, for a mapped page that finds the disk full kills the process instead of raising.
            os.posix_fallocate(handle.fileno(), 0, max(size, 1))
        mapped: npt.NDArray[Any] = np.memmap(path, dtype=like.dtype, mode="r+", shape=(rows, dim))
    except OSError as error:
        raise InputError(f"{scratch}: no room for {size / 1e9:.1f} GB of features ({error.strerror})") from error
    finally:
        path.unlink(missing_ok=True)
    return torch.from_numpy(mapped), "disk"
