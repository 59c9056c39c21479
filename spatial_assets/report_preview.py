"""The retrieval report as Dagster shows it: tables, the picture inline, figures it can plot over time, the page.

The page itself is a file, and browsers follow no link from a web page to a file: the link leads to `spatial report`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from spatial_core.config.settings import Settings
from spatial_core.evaluation.serving import report_url
from spatial_core.report import Report

# Event log entries are database rows: a larger picture stays in the report and is only linked.
_MAX_INLINE_BYTES = 400_000
_PLOTTED_METHODS = ("projector", "backbone")
_PLOTTED = ("recall@1", "recall@5", "recall@10", "mAP")


def report_preview(settings: Settings, report: Report) -> Mapping[str, Any]:
    """Metadata of a finished report folder."""
    folder = report.artifact
    page = folder / "report.html"
    metadata: dict[str, Any] = {
        "page": dg.MetadataValue.url(report_url(settings.logging.report_port)),
        "page_opens": dg.MetadataValue.md("while `make dev` or `spatial report` runs on the machine that holds it"),
        "page_file": dg.MetadataValue.path(page),
        "metrics": dg.MetadataValue.md((folder / "summary.md").read_text()),
    }
    picture = folder / "summary.png"
    if picture.stat().st_size <= _MAX_INLINE_BYTES:
        metadata["picture"] = dg.MetadataValue.md(inline_image(picture, "recall of raw features and of the projector"))
    for line in report.details.get("headline", ()):
        for metric in _PLOTTED:
            if line["method"] in _PLOTTED_METHODS and line.get(metric) is not None:
                metadata[f"{line['split']} {line['method']} {metric}"] = float(line[metric])
    return metadata


def inline_image(path: Path, text: str) -> str:
    """A PNG as a markdown image with its bytes inside."""
    return f"![{text}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})"
