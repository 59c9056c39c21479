"""Checks of the whole rather than of one artifact: what is missing, failed or out of date, and what occurs twice.

They only warn: while a backfill runs, missing partitions are normal. A schedule runs them, because a failure is exactly
the case in which no asset is updated and nothing else would look.
"""

import dagster as dg

from spatial_assets.defs.resources import SettingsResource
from spatial_assets.metadata import check_result
from spatial_assets.partition_status import partitions_complete
from spatial_assets.partitions import drops, tars
from spatial_core.lake.catalogue import CATALOGUE
from spatial_core.quality.coverage import coverage
from spatial_core.quality.repetition import images_unique

_PARTITIONED = {kind.name: kind.partition for kind in CATALOGUE.values() if kind.partition and kind.stage}


def _completeness_check(asset: str, partitions: dg.DynamicPartitionsDefinition) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        name="partitions_complete",
        asset=asset,
        description=f"Lists keys of {asset} that are registered but missing, and those whose last run failed.",
    )
    def complete(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        return check_result(partitions_complete(context.instance, asset, partitions))

    return complete


completeness_checks = [
    _completeness_check(asset, tars if partition == "tar" else drops) for asset, partition in _PARTITIONED.items()
]


@dg.asset_check(
    name="coverage",
    asset="raw_tars",
    description="Lists artifacts of the lake that are missing, or were made from other inputs or settings than now.",
)
def lake_coverage(settings: SettingsResource) -> dg.AssetCheckResult:
    """The state of every artifact, from the manifests."""
    return check_result(coverage(settings.load()))


@dg.asset_check(
    name="images_unique",
    asset="intermediates",
    description="Lists pictures whose very bytes stand under two facade points, in one tar or in several.",
)
def lake_images_unique(settings: SettingsResource) -> dg.AssetCheckResult:
    """The same picture under two labels, over all tars."""
    return check_result(images_unique(settings.load()))


standing_checks_job = dg.define_asset_job(
    "standing_checks",
    selection=dg.AssetSelection.checks(*[key for check in completeness_checks for key in check.check_keys])
    | dg.AssetSelection.checks(*lake_coverage.check_keys, *lake_images_unique.check_keys),
    description="Looks for missing, failed and outdated partitions, and for pictures that occur twice.",
)

standing_checks_schedule = dg.ScheduleDefinition(
    name="standing_checks_hourly",
    job=standing_checks_job,
    cron_schedule="0 * * * *",
    default_status=dg.DefaultScheduleStatus.RUNNING,
)
