"""The sensor that evaluates the automation conditions; running from the first start of the daemon."""

from __future__ import annotations

import dagster as dg

automation = dg.AutomationConditionSensorDefinition(
    name="automation",
    target=dg.AssetSelection.all(),
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=15,
    description="Asks for what the automation conditions of the assets say; see `spatial_assets.automation`.",
)
