"""`projector_checkpoint`: the trained "same building" head."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from spatial_assets.automation import after_inputs_with_advice
from spatial_assets.defs.resources import ComputeResource, SettingsResource
from spatial_assets.metadata import markdown_table
from spatial_assets.stages import GPU_POOL, OWNERS, StageAsset, code_version
from spatial_core.config.settings import Settings
from spatial_core.quality import checks
from spatial_core.quality.outcome import CheckOutcome
from spatial_core.report import Report


def checkpoint_sound(settings: Settings, path: Path) -> CheckOutcome:
    """Weights as recorded and finite."""
    return checks.checkpoint_sound(path)


def advice_taken(settings: Settings, report: Report) -> Mapping[str, Any]:
    """Which study and trial the hyper-parameters come from, or that they are those of the settings."""
    study = report.details.get("study")
    if study is None:
        return {"hyper_parameters": "of the settings: there is no tuning study"}
    if study["trial"] is None:
        return {"hyper_parameters": f"of the settings: study {study['study']} has no completed trial"}
    made_from = "these inputs" if study["same_inputs"] else "other inputs than these"
    text = (
        f"of trial {study['trial']} of study {study['study']} ({study['metric']} {study['value']:.4f}, on {made_from})"
    )
    rows = [(name, value) for name, value in study["settings"].items()]
    return {"hyper_parameters": text, "tuned": dg.MetadataValue.md(markdown_table(("setting", "value"), rows))}


STAGE = StageAsset("projector_checkpoint", {"checkpoint_sound": checkpoint_sound}, preview=advice_taken)


@dg.asset(
    name="projector_checkpoint",
    deps=["merged_splits", "difficulty_metadata", "tuning_study"],
    automation_condition=after_inputs_with_advice,
    check_specs=STAGE.check_specs(),
    group_name="projector",
    kinds={"pytorch", "safetensors", "mlflow"},
    owners=OWNERS,
    code_version=code_version("projector_checkpoint"),
    pool=GPU_POOL,
    description=(
        "Weights of the projection head that maps backbone features to 256 unit-length numbers, so that pictures of "
        "one building lie close together. Trained on triplets whose negatives come from the difficulty bands; the "
        "best checkpoint by validation recall. Where there is a tuning_study, its best trial's hyper-parameters take "
        "the place of the settings'. Its columns are its tensors. Training is tracked in MLflow.\n\n"
        "Source: merged_splits (train, val), difficulty_metadata, and tuning_study where made. Licence: the project's, "
        "within the tars' terms. Grain: one head."
    ),
)
def projector_checkpoint(
    context: dg.AssetExecutionContext, settings: SettingsResource, compute: ComputeResource
) -> Iterator[dg.MaterializeResult[Any]]:
    """Train the head."""
    yield from STAGE.whole(context, settings, compute)
