"""Small backbones of every family, made once, and one published model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spatial_core.publishing.model_folder import publish_model
from tests.data.make_model import make_backbone, make_checkpoint, model_settings

Backbones = Callable[[str], Path]


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    """Family -> folder of a small model of it."""
    root = tmp_path_factory.mktemp("backbones")

    def folder(family: str) -> Path:
        path = root / f"small-{family.replace('_', '-')}"
        return path if path.is_dir() else make_backbone(path, family)

    return folder


@pytest.fixture(scope="session")
def published(backbones: Backbones, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full model on the small DINOv2; to be read only."""
    root = tmp_path_factory.mktemp("published")
    backbone = backbones("dinov2")
    checkpoint = make_checkpoint(root / "checkpoint_best.safetensors", backbone)
    publish_model(checkpoint, root / "model", model_settings(root, backbone))
    return root / "model"
