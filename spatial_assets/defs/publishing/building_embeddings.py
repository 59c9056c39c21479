"""`building_embeddings`: one vector per building of a drop."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pyarrow as pa

from spatial_assets.automation import per_key
from spatial_assets.defs.resources import ComputeResource, SettingsResource
from spatial_assets.metadata import column_schema
from spatial_assets.partitions import MANY_KEYS, drops
from spatial_assets.stages import CPU_POOL, OWNERS, StageAsset, code_version
from spatial_core import schemas
from spatial_core.quality.checks import buildings_sound

STAGE = StageAsset(
    "building_embeddings",
    {"buildings_sound": lambda settings, path: buildings_sound(path)},
)


@dg.asset(
    name="building_embeddings",
    deps=["final_embeddings"],
    partitions_def=drops,
    backfill_policy=MANY_KEYS,
    automation_condition=per_key,
    group_name="publishing",
    kinds={"parquet", "python"},
    owners=OWNERS,
    code_version=code_version("building_embeddings"),
    pool=CPU_POOL,
    metadata={"dagster/column_schema": column_schema(schemas.building_embeddings(pa.string()))},
    description=(
        "The renormalised mean of the vectors of each OSMID, with the number of pictures and how well they agree.\n\n"
        "Source: final_embeddings of the same drop. Licence: that of the drop. Grain: one OSMID."
    ),
)
def building_embeddings(
    context: dg.AssetExecutionContext, settings: SettingsResource, compute: ComputeResource
) -> Iterator[dg.MaterializeResult[Any]]:
    """Pool the vectors of this run's keys."""
    yield from STAGE.keys(context, settings, compute)
