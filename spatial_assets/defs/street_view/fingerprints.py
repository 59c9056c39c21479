"""`fingerprints`: small thumbnails of one tar's pictures, which decide visual difficulty."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from spatial_assets.automation import per_key
from spatial_assets.defs.resources import ComputeResource, SettingsResource
from spatial_assets.metadata import column_schema
from spatial_assets.partitions import MANY_KEYS, tars
from spatial_assets.stages import CPU_POOL, OWNERS, StageAsset, code_version
from spatial_core import schemas
from spatial_core.quality.checks import fingerprints_sound

STAGE = StageAsset(
    "fingerprints",
    {"fingerprints_sound": lambda settings, path: fingerprints_sound(path)},
)


@dg.asset(
    name="fingerprints",
    deps=["raw_tars", "intermediates"],
    partitions_def=tars,
    backfill_policy=MANY_KEYS,
    automation_condition=per_key,
    group_name="street_view",
    kinds={"parquet", "python"},
    owners=OWNERS,
    code_version=code_version("fingerprints"),
    pool=CPU_POOL,
    metadata={"dagster/column_schema": column_schema(schemas.fingerprints(16))},
    description=(
        "A 16x16 RGB thumbnail of every picture, 768 numbers: what two facades look like from afar. Pictures are read "
        "from the tar by offset.\n\n"
        "Source: intermediates and the bytes of raw_tars. Licence: that of the tar. Grain: one picture."
    ),
)
def fingerprints(
    context: dg.AssetExecutionContext, settings: SettingsResource, compute: ComputeResource
) -> Iterator[dg.MaterializeResult[Any]]:
    """Fingerprint the pictures of this run's keys."""
    yield from STAGE.keys(context, settings, compute)
