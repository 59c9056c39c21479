"""`retrieval_report`: how well the head finds other pictures of the same building, beside what it must beat."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from spatial_assets.automation import after_inputs
from spatial_assets.defs.resources import ComputeResource, SettingsResource
from spatial_assets.report_preview import report_preview
from spatial_assets.stages import GPU_POOL, OWNERS, StageAsset, code_version
from spatial_core.config.settings import Settings
from spatial_core.quality import checks
from spatial_core.quality.outcome import CheckOutcome


def report_sound(settings: Settings, path: Path) -> CheckOutcome:
    """Metrics between 0 and 1, confidence intervals around them, the page and the figures there."""
    return checks.report_sound(path)


STAGE = StageAsset(
    "retrieval_report",
    {"report_sound": report_sound},
    preview=report_preview,
)


@dg.asset(
    name="retrieval_report",
    deps=["merged_splits", "difficulty_metadata", "projector_checkpoint"],
    automation_condition=after_inputs,
    check_specs=STAGE.check_specs(),
    group_name="projector",
    kinds={"json", "html"},
    owners=OWNERS,
    code_version=code_version("retrieval_report"),
    pool=GPU_POOL,
    description=(
        "Recall@k, mAP and MRR with confidence intervals on buildings the head was not trained on, beside raw backbone "
        "features, PCA and chance; by difficulty, angle and distance; as JSON and as one HTML page that needs no "
        "network.\n\n"
        "Source: merged_splits (val, test), projector_checkpoint, and thumbnails from raw_tars where they still lie. "
        "Licence: that of the tars for the thumbnails. Grain: one split, method and metric."
    ),
)
def retrieval_report(
    context: dg.AssetExecutionContext, settings: SettingsResource, compute: ComputeResource
) -> Iterator[dg.MaterializeResult[Any]]:
    """Evaluate the head."""
    yield from STAGE.whole(context, settings, compute)
