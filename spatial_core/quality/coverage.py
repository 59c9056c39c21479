"""The standing question over the whole lake: which partitions are missing, stale or not covered downstream."""

from __future__ import annotations

from spatial_core.config.settings import Settings
from spatial_core.lake.status import lake_status
from spatial_core.quality.outcome import CheckOutcome


def coverage(settings: Settings) -> CheckOutcome:
    """Every registered tar and drop has its artifacts, made from the inputs and settings of now.

    Only warns: while a backfill runs, missing partitions are normal.
    """
    partitioned = [status for status in lake_status(settings) if status.partition]
    wanting = {
        state: [f"{status.asset} {status.partition}" for status in partitioned if status.state == state]
        for state in ("missing", "stale", "touched", "gone")
    }
    faults = [f"{len(names)} {state}: {', '.join(names[:10])}" for state, names in wanting.items() if names]
    passed = not (wanting["missing"] or wanting["stale"])
    made = sum(status.state == "made" for status in partitioned)
    summary = "; ".join(faults) if faults else f"all {made} partitioned artifacts are made and current"
    return CheckOutcome("coverage", passed, summary, "warn", {"made": made, **wanting})
