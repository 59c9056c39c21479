"""`backbone_embeddings`: features of one tar's pictures from a pretrained vision transformer."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from spatial_assets.automation import per_key
from spatial_assets.defs.resources import ComputeResource, SettingsResource
from spatial_assets.metadata import column_schema
from spatial_assets.partitions import MANY_KEYS, tars
from spatial_assets.stages import GPU_POOL, OWNERS, StageAsset, code_version
from spatial_core import schemas
from spatial_core.quality.checks import embeddings_sound

STAGE = StageAsset(
    "backbone_embeddings",
    {"embeddings_sound": lambda settings, path: embeddings_sound(path)},
)


@dg.asset(
    name="backbone_embeddings",
    deps=["raw_tars", "intermediates"],
    partitions_def=tars,
    backfill_policy=MANY_KEYS,
    automation_condition=per_key,
    group_name="street_view",
    kinds={"parquet", "pytorch", "huggingface"},
    owners=OWNERS,
    code_version=code_version("backbone_embeddings"),
    pool=GPU_POOL,
    metadata={"dagster/column_schema": column_schema(schemas.embeddings(384, "float32"))},
    description=(
        "Pooled features of a frozen backbone (any DINOv2 or DINOv3, by hub id or folder at a pinned revision) for "
        "every picture, not normalised; their width is the backbone's. A killed partition goes on from its finished "
        "pieces.\n\n"
        "Source: intermediates and the bytes of raw_tars, through `embedding_model.model_name`. Licence: that of the "
        "tar, and the backbone's for what is derived from its weights. Grain: one picture."
    ),
)
def backbone_embeddings(
    context: dg.AssetExecutionContext, settings: SettingsResource, compute: ComputeResource
) -> Iterator[dg.MaterializeResult[Any]]:
    """Embed the pictures of this run's keys."""
    yield from STAGE.keys(context, settings, compute)
