"""A tuning study as Dagster shows it: the best trials, the history of the search, what mattered, the page."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import dagster as dg

from spatial_assets.metadata import markdown_table
from spatial_core.config.settings import Settings
from spatial_core.report import Report

_SHOWN_TRIALS = 10
# Event log entries are database rows.
_MAX_INLINE_BYTES = 400_000


def study_preview(settings: Settings, report: Report) -> Mapping[str, Any]:
    """Metadata of a finished study."""
    from spatial_core.tuning.page import PAGE, best_trials, history_picture, shown_value

    record = json.loads(report.artifact.read_bytes())
    page = report.artifact.with_name(PAGE)
    metadata: dict[str, Any] = {"page": dg.MetadataValue.path(page), "page_url": dg.MetadataValue.url(page.as_uri())}
    best = best_trials(record, _SHOWN_TRIALS)
    if best:
        names = list(best[0]["parameters"])
        rows = [
            (
                trial["number"],
                f"{trial['value']:.4f}",
                trial["best_epoch"],
                *(shown_value(trial["parameters"][name]) for name in names),
            )
            for trial in best
        ]
        header = ("trial", record["metric"], "epoch", *names)
        metadata["best_trials"] = dg.MetadataValue.md(markdown_table(header, rows))
        metadata["best_value"] = float(best[0]["value"])
    picture = history_picture(record).encode()
    if picture and len(picture) <= _MAX_INLINE_BYTES:
        data = base64.b64encode(picture).decode()
        metadata["history"] = dg.MetadataValue.md(f"![objective by trial](data:image/svg+xml;base64,{data})")
    if record["importances"]:
        shares = [(name, f"{share:.0%}") for name, share in record["importances"].items()]
        metadata["importances"] = dg.MetadataValue.md(markdown_table(("hyper-parameter", "share"), shares))
    return metadata
