"""Finding again the backbone that a head was trained on, and nothing that merely has its name."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from spatial_core.backbones.loading import Backbone, load_source
from spatial_core.backbones.model_source import ModelSource, find_model
from spatial_core.backbones.seeded import PREFIX
from spatial_core.config.settings import Settings
from spatial_core.errors import ModelError


def find_backbone(model_id: str | None, revision: str | None, settings: Settings) -> ModelSource:
    """Locate a recorded backbone.

    Args:
        model_id: hub id, `seeded:<name>` or folder name, as recorded with the features; None when nothing was
            recorded, which makes it the backbone of `[embedding_model]`.
        revision: recorded commit or digest.
        settings: `embedding_model.model_name` says where the folder of a backbone that came from a folder is now.

    Raises:
        ModelError: if it is not there, or is not the recorded revision.
        ConfigError: as `find_model`.
    """
    section = settings.embedding_model
    find = partial(
        find_model,
        cache_dir=settings.locations.data_dir / "backbones",
        base_dir=settings.base_dir,
        trust_remote_code=section.trust_remote_code,
    )
    if model_id is None:
        return find(section.model_name, section.revision)
    folder = settings.base_dir / Path(section.model_name).expanduser()
    if folder.is_dir() and not section.model_name.startswith(PREFIX):
        source = find(section.model_name, None)
        if source.revision == revision:
            return source
    try:
        return find(model_id, revision)
    except ModelError as error:
        raise ModelError(
            f"backbone {model_id}@{revision}, which the head was trained on: {error}; if it is a folder, let "
            "embedding_model.model_name name it"
        ) from error


def load_found(source: ModelSource, pooling_type: str, settings: Settings) -> Backbone:
    """Load it in fp32 on the CPU, where publishing computes its golden vectors."""
    return load_source(source, pooling_type=pooling_type, trust_remote_code=settings.embedding_model.trust_remote_code)
