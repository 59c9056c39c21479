"""`projector_checkpoint`: the trained "same building" head."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from spatial_assets.automation import after_inputs
from spatial_assets.defs.resources import ComputeResource, SettingsResource
from spatial_assets.stages import GPU_POOL, OWNERS, StageAsset, code_version
from spatial_core.config.settings import Settings
from spatial_core.quality import checks
from spatial_core.quality.outcome import CheckOutcome


def checkpoint_sound(settings: Settings, path: Path) -> CheckOutcome:
    """Weights as recorded and finite."""
    return checks.checkpoint_sound(path)


STAGE = StageAsset(
    "projector_checkpoint",
    {"checkpoint_sound": checkpoint_sound},
)


@dg.asset(
    name="projector_checkpoint",
    deps=["merged_splits", "difficulty_metadata"],
    automation_condition=after_inputs,
    check_specs=STAGE.check_specs(),
    group_name="projector",
    kinds={"pytorch", "safetensors", "mlflow"},
    owners=OWNERS,
    code_version=code_version("projector_checkpoint"),
    pool=GPU_POOL,
    description=(
        "Weights of the projection head that maps backbone features to 256 unit-length numbers, so that pictures of "
        "one building lie close together. Trained on triplets whose negatives come from the difficulty bands; the "
        "best checkpoint by validation recall. Its columns are its tensors. Training is tracked in MLflow.\n\n"
        "Source: merged_splits (train, val) and difficulty_metadata. Licence: the project's, within the tars' terms. "
        "Grain: one head."
    ),
)
def projector_checkpoint(
    context: dg.AssetExecutionContext, settings: SettingsResource, compute: ComputeResource
) -> Iterator[dg.MaterializeResult[Any]]:
    """Train the head."""
    yield from STAGE.whole(context, settings, compute)
