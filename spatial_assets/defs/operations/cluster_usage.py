"""`cluster_usage`: what every cluster job used and cost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from spatial_assets.defs.resources import ComputeResource, SettingsResource
from spatial_assets.metadata import column_schema
from spatial_assets.stages import OWNERS, StageAsset, code_version
from spatial_assets.usage_preview import usage_preview
from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.quality import checks
from spatial_core.quality.outcome import CheckOutcome


def usage_sound(settings: Settings, path: Path) -> CheckOutcome:
    """Every job once, none that ended before it started, a cost for each."""
    return checks.usage_sound(path)


STAGE = StageAsset("cluster_usage", {"usage_sound": usage_sound}, preview=usage_preview)


# In no pool: it takes a moment, and must not wait for a run that holds a pool as long as its jobs are queued.
@dg.asset(
    name="cluster_usage",
    check_specs=STAGE.check_specs(),
    group_name="operations",
    kinds={"parquet", "html"},
    owners=OWNERS,
    code_version=code_version("cluster_usage"),
    metadata={"dagster/column_schema": column_schema(schemas.CLUSTER_USAGE)},
    description=(
        "How every job on the cluster ended, what it used of what it was given, and what that cost at the prices of "
        "the settings (`compute.cost_per_gpu_hour`, `compute.cost_per_cpu_hour`); with a page and a chart by asset. "
        "Made when a person asks for it, always on this machine.\n\n"
        "Source: the record that runs keep of job endings, from the cluster's accounting. Licence: the project's. "
        "Grain: one job, or one task of an array."
    ),
)
def cluster_usage(
    context: dg.AssetExecutionContext, settings: SettingsResource, compute: ComputeResource
) -> Iterator[dg.MaterializeResult[Any]]:
    """Gather the endings."""
    yield from STAGE.whole(context, settings, compute)
