"""`final_embeddings`: "same building" vectors of one drop's pictures."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pyarrow as pa

from spatial_assets.automation import per_key_with_model
from spatial_assets.defs.resources import ComputeResource, SettingsResource
from spatial_assets.metadata import column_schema
from spatial_assets.partitions import MANY_KEYS, drops
from spatial_assets.stages import GPU_POOL, OWNERS, StageAsset, code_version
from spatial_core import schemas
from spatial_core.quality.checks import vectors_sound

STAGE = StageAsset(
    "final_embeddings",
    {"vectors_sound": lambda settings, path: vectors_sound(path)},
)


@dg.asset(
    name="final_embeddings",
    deps=["packaged_images", "hf_model"],
    partitions_def=drops,
    backfill_policy=MANY_KEYS,
    automation_condition=per_key_with_model("packaged_images", "hf_model"),
    group_name="publishing",
    kinds={"parquet", "huggingface"},
    owners=OWNERS,
    code_version=code_version("final_embeddings"),
    pool=GPU_POOL,
    metadata={"dagster/column_schema": column_schema(schemas.final_embeddings(pa.string()))},
    description=(
        "A folder of part files with one unit-length vector per picture of a drop, and `state.json`, by which an "
        "interrupted run goes on. OSMID has the type it came with. Pictures that cannot be read are listed with their "
        "reason.\n\n"
        "Source: packaged_images through hf_model; made again when either changes. Licence: that of the drop. "
        "Grain: one picture."
    ),
)
def final_embeddings(
    context: dg.AssetExecutionContext, settings: SettingsResource, compute: ComputeResource
) -> Iterator[dg.MaterializeResult[Any]]:
    """Embed the drops of this run's keys."""
    yield from STAGE.keys(context, settings, compute)
