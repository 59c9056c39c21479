"""Small splits and difficulty tables with something to learn in them, from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from spatial_core import schemas
from spatial_core.config.settings import Settings, load_settings
from spatial_core.storage.parquet import parquet_sink, vectors_to_arrow
from spatial_core.storage.provenance import Provenance

DEFAULTS = Path(__file__).with_name("defaults.toml")
MODEL = {"id": "seeded:test", "revision": "r1", "pooling": "cls_token"}


@dataclass(frozen=True)
class Lake:
    """What the stage reads and writes."""

    merged: Path
    difficulty: Path
    output: Path


def split_table(buildings: range, seed: int, dim: int, dtype: str = "float32", spacing: float = 0.001) -> pa.Table:
    """Images whose features are a building's code plus strong noise in directions that a head can learn to ignore."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(2, 6, len(buildings))
    target = np.repeat(np.array(buildings), sizes)
    codes = generator.normal(size=(len(buildings), dim // 4))
    features = generator.normal(size=(len(target), dim)) * 2
    features[:, : dim // 4] = np.repeat(codes, sizes, axis=0) + generator.normal(size=(len(target), dim // 4)) * 0.15
    order = generator.permutation(len(target))
    target, features = target[order], features[order]
    patch = np.arange(len(target)) + 1000 * seed
    columns = {
        "dataset_id": pa.array(np.full(len(target), 7)),
        "target_id": pa.array(target),
        "patch_id": pa.array(patch),
        "street_view_id": pa.array(patch),
        "target_lat": pa.array(45 + target * spacing),
        "target_lon": pa.array(np.full(len(target), 7.0)),
        "building_id": pa.array([f"0007_{t}" for t in target]),
        "streetview_image_id": pa.array([f"0007_{p}" for p in patch]),
        "embedding": vectors_to_arrow(features.astype(dtype)),
    }
    return pa.table(columns)


def write_split(path: Path, table: pa.Table, model: dict[str, str] | None = None, row_group: int = 64) -> None:
    provenance = Provenance("merge", "1", "digest", model=model or MODEL, preprocessing="test-224")
    path.parent.mkdir(parents=True, exist_ok=True)
    with parquet_sink(path, table.schema, provenance) as writer:
        writer.write_table(table, row_group_size=row_group)


def write_difficulty(path: Path, tables: list[pa.Table], seed: int, neighbours: int = 12) -> None:
    """Neighbours drawn at random from all buildings, bands ascending as in the real table."""
    generator = np.random.default_rng(seed)
    everywhere = np.unique(np.concatenate([table["building_id"].to_numpy() for table in tables]))
    images = [image for table in tables for image in table["streetview_image_id"].to_pylist()]
    lists = [generator.choice(everywhere, neighbours).tolist() for _ in images]
    bands = [np.sort(generator.integers(0, 7, neighbours)).tolist() for _ in images]
    distances = [np.sort(generator.random(neighbours)).tolist() for _ in images]
    with parquet_sink(path, schemas.DIFFICULTY) as writer:
        writer.write_table(pa.table([images, lists, distances, bands], schema=schemas.DIFFICULTY), row_group_size=100)


def build_lake(root: Path, *, train: int = 24, val: int = 10, dim: int = 16) -> Lake:
    tables = [split_table(range(train), 1, dim), split_table(range(1000, 1000 + val), 2, dim)]
    lake = Lake(root / "merged", root / "difficulty.parquet", root / "checkpoints")
    for name, table in zip(("train", "val"), tables, strict=True):
        write_split(lake.merged / f"{name}.parquet", table)
    write_difficulty(lake.difficulty, tables, 3)
    return lake


def train_settings(*overrides: str) -> Settings:
    """Fast settings without tracking."""
    fast = [
        "logging.wandb_enabled=false",
        "infrastructure.device=cpu",
        "infrastructure.threads=1",
        "training_model.hidden_dim=24",
        "training_model.output_dim=8",
        "training.batch_size=16",
        "training.num_epochs=3",
        "training.learning_rate=0.003",
        "training.ucb_warmup_samples=50",
        "training.retrieval_metric_top_k=[1, 5]",
    ]
    return load_settings(DEFAULTS, [*fast, *overrides], environ={})
