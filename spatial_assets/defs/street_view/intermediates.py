"""`intermediates`: validated pictures and poses of one tar."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from spatial_assets.automation import per_key
from spatial_assets.defs.resources import ComputeResource, SettingsResource
from spatial_assets.metadata import column_schema
from spatial_assets.partitions import MANY_KEYS, tars
from spatial_assets.stages import CPU_POOL, OWNERS, StageAsset, code_version
from spatial_assets.tar_preview import tar_preview
from spatial_core import schemas
from spatial_core.quality.checks import intermediates_sound

STAGE = StageAsset(
    "intermediates",
    {"intermediates_sound": lambda settings, path: intermediates_sound(path, settings)},
    preview=tar_preview,
)


@dg.asset(
    name="intermediates",
    deps=["raw_tars"],
    partitions_def=tars,
    backfill_policy=MANY_KEYS,
    automation_condition=per_key,
    group_name="street_view",
    kinds={"parquet", "python"},
    owners=OWNERS,
    code_version=code_version("intermediates"),
    pool=CPU_POOL,
    metadata={"dagster/column_schema": column_schema(schemas.INTERMEDIATES)},
    description=(
        "Every picture of a tar that decodes completely and has a valid pose, with geometry, alignment quality, and "
        "where its bytes lie in the tar. The tar is read once and never extracted; what is refused is listed with "
        "reason and offset in `NNNN_rejects.parquet`: kept + rejected = members.\n\n"
        "Source: raw_tars. Licence: that of the tar. Grain: one picture."
    ),
)
def intermediates(
    context: dg.AssetExecutionContext, settings: SettingsResource, compute: ComputeResource
) -> Iterator[dg.MaterializeResult[Any]]:
    """Ingest the tars of this run's keys."""
    yield from STAGE.keys(context, settings, compute)
