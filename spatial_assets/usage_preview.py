"""The usage of the cluster as Dagster shows it: a table, the chart inline, sums it can plot over time, the page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import dagster as dg

from spatial_assets.metadata import markdown_table
from spatial_core.config.settings import Settings
from spatial_core.report import Report


def usage_preview(settings: Settings, report: Report) -> Mapping[str, Any]:
    """Metadata of a finished table of usage."""
    from spatial_core.cluster.usage import AssetUsage, page_of
    from spatial_core.cluster.usage_page import HEADER, cells, picture

    usage = [AssetUsage(**record) for record in report.details["assets"]]
    page = page_of(report.artifact)
    metadata: dict[str, Any] = {"page": dg.MetadataValue.path(page), "page_url": dg.MetadataValue.url(page.as_uri())}
    if usage:
        data = base64.b64encode(picture(usage).encode()).decode()
        metadata["chart"] = dg.MetadataValue.md(f"![use by asset](data:image/svg+xml;base64,{data})")
        metadata["by_asset"] = dg.MetadataValue.md(markdown_table(HEADER, [cells(one) for one in usage]))
    metadata["gpu_hours"] = round(sum(one.gpu_s for one in usage) / 3600, 2)
    metadata["core_hours"] = round(sum(one.core_s for one in usage) / 3600, 2)
    metadata["cost"] = round(float(sum(one.cost for one in usage)), 2)
    return metadata
