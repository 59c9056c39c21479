"""One ingested tar as Dagster shows it: figures it can plot over time, and the share of lonely buildings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spatial_core.config.settings import Settings
from spatial_core.lake.statistics import tar_statistics
from spatial_core.report import Report


def tar_preview(settings: Settings, report: Report) -> Mapping[str, Any]:
    """Metadata of finished intermediates."""
    key, rejects = report.artifact.stem, report.artifact.with_name(f"{report.artifact.stem}_rejects.parquet")
    (tar,) = tar_statistics({key: report.artifact}, {key: rejects})
    figures = {
        "images": tar.images,
        "buildings": tar.buildings,
        "images_per_building": tar.images_per_building,
        "singleton_share": round(tar.singleton_share, 4),
        "distance_mean_m": tar.distance_mean_m,
        "aligned_images": tar.aligned_images,
        "repeated_images": tar.repeated_images,
    }
    return {name: value for name, value in figures.items() if value is not None}
