"""A small lake whose truth is planted: the head keeps what tells buildings apart, raw features drown it in noise."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch

from spatial_core import schemas
from spatial_core.metric_learning.checkpoint import Backbone, Checkpoint, save_checkpoint
from spatial_core.metric_learning.projector import Projector, ProjectorConfig
from spatial_core.storage.parquet import parquet_sink, vectors_to_arrow
from spatial_core.storage.provenance import Provenance

SIGNAL, NOISE, OUTPUT = 12, 36, 16
MODEL = {"id": "seeded:test", "revision": "1"}


@dataclass
class Lake:
    """Where the planted files lie."""

    root: Path
    merged: Path = field(init=False)
    checkpoint: Path = field(init=False)
    difficulty: Path = field(init=False)
    intermediates: Path = field(init=False)
    raw: Path = field(init=False)

    def __post_init__(self) -> None:
        self.merged, self.intermediates, self.raw = (self.root / name for name in ("merged", "intermediates", "raw"))
        self.checkpoint = self.root / "checkpoints" / "checkpoint_best.safetensors"
        self.difficulty = self.root / "difficulty" / "difficulty_metadata.parquet"


def planted_head(path: Path, *, history: int = 6, model: dict[str, str] | None = None) -> None:
    """A head that passes the signal through and drops the rest."""
    config = ProjectorConfig(SIGNAL + NOISE, (16,), OUTPUT, "relu", 0.0, use_residual=True, use_layer_norm=False)
    projector = Projector(config)
    with torch.no_grad():
        for weight in projector.parameters():
            weight.zero_()
        assert projector.residual_proj is not None
        projector.residual_proj.weight[:SIGNAL, :SIGNAL] = torch.eye(SIGNAL)
    epochs = tuple(
        {
            "epoch": epoch,
            "train_loss": 0.4 / epoch,
            "active_fraction": 0.7 / epoch,
            "band_shares": {str(band): (7 - band + epoch) / (28 + 7 * epoch) for band in range(7)} | {"random": 0.0},
            "band_rewards": {"0": 0.5, "6": None},
            "validation": {
                "loss": 0.45 / epoch + 0.05,
                **{f"recall@{k}": 1 - 0.5 / epoch / k**0.5 for k in (1, 5, 10, 100)},
                "map": 0.5,
            },
        }
        for epoch in range(1, history + 1)
    )
    provenance = Provenance("train", "1", "c" * 64, {}, {"merged": "a" * 64})
    backbone = Backbone(MODEL if model is None else model, "pixels/1")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, Checkpoint(projector, history, {"recall@1": 0.9}, epochs, backbone, provenance))


def facade(building: int, view: int, generator: np.random.Generator, side: int = 640) -> bytes:
    """A JPEG of a wall with windows in the building's colours, moved and lit differently in every view."""
    colours = np.random.default_rng(building).integers(60, 220, (3, 3))
    rows, columns = 3 + building % 4, 3 + building % 5
    picture = np.empty((side, side, 3), dtype=np.uint8)
    picture[:] = np.linspace(235, 170, side)[:, None, None] * np.array([0.85, 0.93, 1.0])
    left, top = (side * (0.12 + 0.06 * generator.random(2))).astype(int)
    right, bottom = side - left, side - side // 12
    picture[top:bottom, left:right] = colours[0]
    for row in range(rows):
        for column in range(columns):
            y = top + (bottom - top) * (2 * row + 1) // (2 * rows + 1)
            x = left + (right - left) * (2 * column + 1) // (2 * columns + 1)
            high, wide = (bottom - top) // (2 * rows + 1), (right - left) // (2 * columns + 1)
            picture[y : y + high, x : x + wide] = colours[1] if (row + view) % 3 else colours[2]
    light = 0.75 + 0.4 * generator.random()
    return simplejpeg.encode_jpeg(np.clip(picture * light, 0, 255).astype(np.uint8), quality=85)


def write_tar(path: Path, members: dict[str, bytes]) -> dict[str, int]:
    """Write a tar; returns where each member's data begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    with tarfile.open(path) as archive:
        return {entry.name: entry.offset_data for entry in archive}


@pytest.fixture
def make_lake(tmp_path: Path) -> Callable[..., Lake]:
    """Factory of lakes; every part but splits and checkpoint can be left out."""

    def make(
        buildings: dict[str, int] | None = None,
        *,
        seed: int = 0,
        dtype: str = "float32",
        geometry: bool = True,
        pictures: bool = True,
        noise: float = 0.55,
    ) -> Lake:
        lake = Lake(tmp_path / f"lake{seed}")
        generator = np.random.default_rng(seed)
        counts = {"train": 60, "val": 40, "test": 50} if buildings is None else buildings
        rows: list[dict[str, object]] = []
        signals: list[np.ndarray] = []
        styles = generator.normal(size=(6, SIGNAL))
        for split, count in counts.items():
            for _ in range(count):
                building = len({row["building_id"] for row in rows}) + 1
                centre = styles[building % 6] + 0.7 * generator.normal(size=SIGNAL)
                lat, lon = 52.0 + 1e-4 * building, 4.0 + 1e-4 * generator.random()
                for view in range(int(generator.integers(2, 6))):
                    patch = len(rows) + 1
                    bearing, distance = np.radians(generator.uniform(0, 120)), generator.uniform(4, 60)
                    row = dict.fromkeys((f.name for f in schemas.GEOMETRY), 0.0)
                    row |= {
                        "split": split, "view": view, "dataset_id": 1 + building % 2, "target_id": building,
                        "patch_id": patch, "street_view_id": patch, "target_lat": lat, "target_lon": lon,
                        "building_id": f"{1 + building % 2:04d}_{building}",
                        "streetview_image_id": f"{1 + building % 2:04d}_{patch}",
                        "image_path": f"{patch}.jpg", "tar_file": f"{1 + building % 2:04d}.tar",
                        "street_view_lat": lat + distance * np.cos(bearing) / 111_320,
                        "street_view_lon": lon + distance * np.sin(bearing) / 111_320 / np.cos(np.radians(lat)),
                        "distance_m": distance, "image_width": 640, "image_height": 640,
                        "image_offset": 0, "image_bytes": 0, "image_sha256": "0" * 64,
                    }  # fmt: skip
                    rows.append(row)
                    signals.append(centre + noise * generator.normal(size=SIGNAL))
        signal = np.array(signals).reshape(len(rows), SIGNAL)
        drowned = np.concatenate([signal, 1.6 * generator.normal(size=(len(rows), NOISE))], axis=1)
        if pictures:
            write_pictures(lake, rows, generator)
        write_splits(lake, counts, rows, drowned.astype(dtype), geometry=geometry)
        write_difficulty(lake, rows, signal)
        planted_head(lake.checkpoint)
        return lake

    return make


def write_pictures(lake: Lake, rows: list[dict[str, object]], generator: np.random.Generator) -> None:
    for number in sorted({int(str(row["dataset_id"])) for row in rows}):
        own = [row for row in rows if row["dataset_id"] == number]
        members = {
            str(row["image_path"]): facade(int(str(row["target_id"])), int(str(row["view"])), generator) for row in own
        }
        offsets = write_tar(lake.raw / f"{number:04d}.tar", members)
        for row in own:
            data = members[str(row["image_path"])]
            row |= {
                "image_offset": offsets[str(row["image_path"])],
                "image_bytes": len(data),
                "image_sha256": hashlib.sha256(data).hexdigest(),
            }
        lake.intermediates.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(own, schema=schemas.INTERMEDIATES)
        pq.write_table(table, lake.intermediates / f"{number:04d}.parquet")


def write_splits(
    lake: Lake, splits: dict[str, int], rows: list[dict[str, object]], features: np.ndarray, *, geometry: bool
) -> None:
    schema = schemas.splits(features.shape[1], str(features.dtype))
    if not geometry:
        known = {"embedding", *(entry.name for entry in schemas.IDENTITY)}
        schema = pa.schema([entry for entry in schema if entry.name in known])
    provenance = Provenance("merge", "1", "d" * 64, {}, {"embeddings": "e" * 64}, MODEL, "pixels/1")
    for split in splits:
        places = [place for place, row in enumerate(rows) if row["split"] == split]
        own = [rows[place] for place in places]
        columns = [
            vectors_to_arrow(features[places])
            if entry.name == "embedding"
            else pa.array([row[entry.name] for row in own], entry.type)
            for entry in schema
        ]
        with parquet_sink(lake.merged / f"{split}.parquet", schema, provenance) as writer:
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def write_difficulty(lake: Lake, rows: list[dict[str, object]], signal: np.ndarray) -> None:
    """Neighbours by the planted signal, nearest first, 40 at most, in seven bands."""
    records = []
    for place, row in enumerate(rows):
        order = np.argsort(((signal - signal[place]) ** 2).sum(1), kind="stable")
        other = [near for near in order.tolist() if rows[near]["building_id"] != row["building_id"]][:40]
        records.append(
            {
                "target_coord_hash": row["streetview_image_id"],
                "neighbor_building_ids": [rows[near]["building_id"] for near in other],
                "neighbor_distances_meters": [float(rank) for rank in range(len(other))],
                "neighbor_bands": [min(6, rank * 7 // 40) for rank in range(len(other))],
            }
        )
    lake.difficulty.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records, schema=schemas.DIFFICULTY), lake.difficulty)
