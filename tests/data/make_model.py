"""Small models from a seed: a backbone folder as transformers saves it, a head's checkpoint, a drop of images.

Nothing of it is committed or downloaded; the loading code that meets these files is the real one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModel, Dinov2Config, Dinov2WithRegistersConfig, DINOv3ViTConfig

from spatial_core.backbones.loading import load_backbone
from spatial_core.config.settings import Settings, load_settings
from spatial_core.metric_learning.checkpoint import Backbone, Checkpoint, save_checkpoint
from spatial_core.metric_learning.projector import Projector, ProjectorConfig
from spatial_core.storage.provenance import Provenance
from tests.data.make_tars import picture

WIDTH = 32
SIDE_PX = 56
_SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE_PX,
}
_CONFIGS: dict[str, Any] = {
    "dinov2": lambda: Dinov2Config(**_SHAPE),
    "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(**_SHAPE),
    "dinov3_vit": lambda: DINOv3ViTConfig(**(_SHAPE | {"intermediate_size": 64, "image_size": 64})),
}
_NORMALISE: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def preprocessor(family: str) -> dict[str, Any]:
    """`preprocessor_config.json` as the family's published models have it, for small pictures."""
    if family.startswith("dinov3"):
        size = {"height": 64, "width": 64}
        return {**_NORMALISE, "image_processor_type": "DINOv3ViTImageProcessorFast", "size": size, "resample": 2}
    return {
        **_NORMALISE,
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 64},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIDE_PX, "width": SIDE_PX},
        "do_convert_rgb": True,
    }


def make_backbone(folder: Path, family: str = "dinov2", seed: int = 0) -> Path:
    """A backbone with seeded weights, saved as a model folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModel.from_config(_CONFIGS[family]()).eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor(family), indent=2))
    return folder


def make_checkpoint(
    path: Path,
    backbone: Path,
    *,
    pooling_type: str = "cls_token",
    seed: int = 1,
    **options: Any,
) -> Path:
    """A head with seeded weights for the features of `backbone`, and the record that says so."""
    loaded = load_backbone(str(backbone), cache_dir=path.parent, pooling_type=pooling_type)
    config = ProjectorConfig(**({"input_dim": loaded.dim, "hidden_widths": (24, 17)} | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(config).eval()
    checkpoint = Checkpoint(
        projector=projector,
        epoch=3,
        metrics={"recall@1": 0.25},
        backbone=Backbone(loaded.describe(), loaded.preprocessing.id),
        provenance=Provenance("train", "1", "c" * 64, {}, {"train": "a" * 64, "difficulty_metadata": "b" * 64}),
    )
    save_checkpoint(path, checkpoint)
    return path


def model_settings(root: Path, backbone: Path, *overrides: str) -> Settings:
    """Settings whose lake is `root`, whose backbone is `backbone`, on the CPU with two threads."""
    return load_settings(
        None,
        [
            f"paths.data_dir={root}",
            f"embedding_model.model_name={backbone}",
            "infrastructure.device=cpu",
            "infrastructure.threads=2",
            *overrides,
        ],
        environ={},
    )


def jpegs(count: int, seed: int = 5) -> list[bytes]:
    """Small JPEGs, all different."""
    rng = np.random.default_rng(seed)
    return [picture(rng, side_px=int(rng.integers(48, 120))) for _ in range(count)]


def write_drop(
    path: Path,
    images: Sequence[bytes | None] | pa.Array,
    ids: Sequence[Any] | pa.Array,
    *,
    valid: Sequence[bool | None] | None = None,
    row_group_size: int = 1 << 20,
) -> Path:
    """A drop with page checksums, so that damage to it can be told."""
    columns: dict[str, Any] = {
        "image_bytes": images if isinstance(images, pa.Array) else pa.array(images, pa.binary()),
        "OSMID": ids if isinstance(ids, pa.Array) else pa.array(ids),
    }
    if valid is not None:
        columns["is_valid"] = pa.array(valid, pa.bool_())
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(
        table, path, row_group_size=row_group_size, write_page_checksum=True, compression="none", use_dictionary=False
    )
    return path
