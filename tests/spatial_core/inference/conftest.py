"""One small published model for all tests of this folder, and settings that use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spatial_core.config.settings import Settings
from spatial_core.publishing.model_folder import publish_model
from tests.data.make_model import make_backbone, make_checkpoint, model_settings


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("backbone") / "small-dinov2")


@pytest.fixture(scope="session")
def model_folder(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    checkpoint = make_checkpoint(root / "checkpoint_best.safetensors", backbone_folder)
    publish_model(checkpoint, root / "model", model_settings(root, backbone_folder))
    return root / "model"


@pytest.fixture
def settings(tmp_path: Path, backbone_folder: Path, model_folder: Path) -> Callable[..., Settings]:
    """Settings with parts of ten rows and batches of four, and overrides."""

    def build(*overrides: str) -> Settings:
        common = (f"paths.model_dir={model_folder}", "inference.read_batch_size=10", "inference.batch_size=4")
        return model_settings(tmp_path / "lake", backbone_folder, *common, *overrides)

    return build
