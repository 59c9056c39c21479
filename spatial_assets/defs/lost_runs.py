"""The sensor that ends runs whose process was lost with the machine; see `spatial_assets.lost_runs`."""

import dagster as dg

from spatial_assets.lost_runs import end_lost_runs


@dg.sensor(
    name="lost_runs",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Ends runs whose process is gone, as after a restart of the machine, so that they are started again.",
)
def lost_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """One look at the runs in progress."""
    lost = end_lost_runs(context.instance)
    return dg.SkipReason(f"ended {', '.join(lost)}: their process is gone" if lost else "every run has its process")
