"""`packaged_images`: parquet files of new pictures in the drops folder, and the sensor that registers them."""

import dagster as dg

from spatial_assets.defs.resources import SettingsResource
from spatial_assets.partitions import drops
from spatial_assets.stages import OWNERS
from spatial_assets.watching import TICK_SECONDS, Watched

packaged_images = dg.AssetSpec(
    "packaged_images",
    group_name="publishing",
    kinds={"parquet", "file"},
    owners=OWNERS,
    partitions_def=drops,
    description=(
        "Parquet files of new pictures as they were copied into the drops folder; the key is the file name without "
        "`.parquet`. Never written here.\n\n"
        "Source: whoever drops them. Licence: theirs. Grain: one picture of one OpenStreetMap object."
    ),
    metadata={
        "dagster/column_schema": dg.TableSchema(
            columns=[
                dg.TableColumn("image_bytes", "binary", description="JPEG"),
                dg.TableColumn("OSMID", "any scalar", description="identifier, carried through unchanged"),
                dg.TableColumn("is_valid", "bool", description="optional; rows where it is false are skipped"),
            ]
        )
    },
)

WATCHED = Watched(
    asset="packaged_images",
    partitions=drops,
    suffix=".parquet",
    folder=lambda at: at.drops_dir,
    pattern=lambda settings: settings.watch.drop_name_pattern,
)


@dg.sensor(
    name="packaged_images_sensor",
    minimum_interval_seconds=TICK_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Registers drops that lie whole in the drops folder and reports them; see `spatial_assets.watching`.",
)
def packaged_images_sensor(
    context: dg.SensorEvaluationContext, settings: SettingsResource
) -> dg.SensorResult | dg.SkipReason:
    """One look at the drops folder."""
    return WATCHED.tick(context, settings.load())
