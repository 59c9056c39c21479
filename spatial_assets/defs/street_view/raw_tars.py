"""`raw_tars`: the tars as they lie in the raw folder, and the sensor that registers them."""

import dagster as dg

from spatial_assets.defs.resources import SettingsResource
from spatial_assets.partitions import tars
from spatial_assets.stages import OWNERS
from spatial_assets.watching import TICK_SECONDS, Watched

raw_tars = dg.AssetSpec(
    "raw_tars",
    group_name="street_view",
    kinds={"tar", "file"},
    owners=OWNERS,
    partitions_def=tars,
    description=(
        "Street-view tars as they were copied into the raw folder, one per rectangular region of a city; the key is "
        "the four-digit number in the file name. Never written here.\n\n"
        "Source: the 3D Street View data set (Zamir et al., ECCV 2016, https://github.com/amir32002/3D_Street_View), "
        "or the procedural city of `spatial demo-data`. "
        "Licence: the data set's own terms, for research; the demo city is free of rights. "
        "Grain: one tar, of which every `.jpg` member is a picture and every `.txt` member of the same stem its pose."
    ),
    metadata={
        "dagster/column_schema": dg.TableSchema(
            columns=[
                dg.TableColumn("<stem>.jpg", "JPEG", description="picture of a facade point, usually 640x640 pixels"),
                dg.TableColumn(
                    "<stem>.txt",
                    "text",
                    description="`d` line: ids, facade point, normal, camera position, distance, heading, pitch, roll; "
                    "`a` line in the aligned release: alignment and its quality",
                ),
            ]
        )
    },
)

WATCHED = Watched(
    asset="raw_tars",
    partitions=tars,
    suffix=".tar",
    folder=lambda at: at.raw_dir,
    pattern=lambda settings: settings.process_tar.tar_name_pattern,
)


@dg.sensor(
    name="raw_tars_sensor",
    minimum_interval_seconds=TICK_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Registers tars that lie whole in the raw folder and reports them; see `spatial_assets.watching`.",
)
def raw_tars_sensor(context: dg.SensorEvaluationContext, settings: SettingsResource) -> dg.SensorResult | dg.SkipReason:
    """One look at the raw folder."""
    return WATCHED.tick(context, settings.load())
