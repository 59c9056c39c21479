"""Training on the two real tars, whose 25 facade points are far fewer than it is meant for."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatial_core.config.settings import load_settings
from spatial_core.metric_learning.checkpoint import load_checkpoint
from spatial_core.metric_learning.training import train_projector
from spatial_core.storage.parquet import read_columns
from spatial_core.street_view.difficulty import compute_difficulty
from spatial_core.street_view.embeddings import embed_tar
from spatial_core.street_view.fingerprints import fingerprint_tar
from spatial_core.street_view.ingest import ingest_tar
from spatial_core.street_view.splits import merge_splits
from tests.data.make_training_lake import DEFAULTS

pytestmark = pytest.mark.real_data
OVERRIDES = [
    "logging.wandb_enabled=false",
    "infrastructure.device=cpu",
    "training.num_epochs=10",
    "training.batch_size=16",
    "training.learning_rate=0.001",
    "data.neighbors=20",
    "data.k0_for_local_scale=5",
    "data.pca_components=8",
]


@pytest.mark.parametrize("ratios", ["data.val_ratio=0.15 data.test_ratio=0.15 data.train_ratio=0.7", ""])
def test_two_real_tars_train_with_and_without_a_val_split(real_data: Path, tmp_path: Path, ratios: str) -> None:
    alone = "data.val_ratio=0 data.test_ratio=0 data.train_ratio=1"
    here = f"paths.data_dir={tmp_path}"
    settings = load_settings(DEFAULTS, [here, *OVERRIDES, *(ratios or alone).split()], environ={})
    for number in ("0201", "0202"):
        tar = real_data / f"buildings/{number}.tar"
        ingest_tar(tar, tmp_path / "intermediates", settings)
        intermediates = tmp_path / f"intermediates/{number}.parquet"
        fingerprint_tar(tar, intermediates, tmp_path / "fingerprints", settings)
        embed_tar(tar, intermediates, tmp_path / "embeddings", settings)
    merge_splits(tmp_path / "embeddings", tmp_path / "merged", settings)
    difficulty = tmp_path / "difficulty.parquet"
    compute_difficulty(tmp_path / "fingerprints", difficulty, settings)

    report = train_projector(tmp_path / "merged", difficulty, tmp_path / "checkpoints", settings)

    images = len(read_columns(tmp_path / "merged/train.parquet", ["building_id"]))
    assert report.rows_in == report.kept == images
    if not ratios:
        assert images == 60
        assert report.details["validated_on"] == "train (val has 0 buildings and 0 images)"
    assert report.details["difficulty"]["covered"] > 0.9 * images
    checkpoint = load_checkpoint(report.artifact)
    assert checkpoint.backbone.model
    assert checkpoint.backbone.preprocessing
    assert checkpoint.history[-1]["train_loss"] < 0.7 * checkpoint.history[0]["train_loss"]
    assert train_projector(tmp_path / "merged", difficulty, tmp_path / "checkpoints", settings).up_to_date
