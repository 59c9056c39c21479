"""The retrieval report as Dagster shows it: the metrics as a table, the figure inline, a link to the page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from spatial_core.config.settings import Settings
from spatial_core.report import Report

# Event log entries are database rows: a larger figure stays in the report and is linked only.
_MAX_INLINE_BYTES = 400_000


def report_preview(settings: Settings, report: Report) -> Mapping[str, Any]:
    """Metadata of a finished report folder."""
    folder = report.artifact
    page = folder / "report.html"
    metadata: dict[str, Any] = {"page": dg.MetadataValue.url(page.as_uri()), "page_path": dg.MetadataValue.path(page)}
    figure = folder / "summary.png"
    if figure.is_file() and figure.stat().st_size <= _MAX_INLINE_BYTES:
        metadata["figure"] = dg.MetadataValue.md(inline_image(figure, "recall of raw features and of the projector"))
    return metadata


def inline_image(path: Path, text: str) -> str:
    """A PNG as a markdown image with its bytes inside."""
    return f"![{text}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})"
