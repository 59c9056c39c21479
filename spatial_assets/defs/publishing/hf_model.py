"""`hf_model`: backbone and head as a model that plain transformers loads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from spatial_assets.automation import after_inputs
from spatial_assets.defs.resources import ComputeResource, SettingsResource
from spatial_assets.stages import CPU_POOL, OWNERS, StageAsset, code_version
from spatial_core.config.settings import Settings
from spatial_core.quality import checks
from spatial_core.quality.outcome import CheckOutcome


def model_sound(settings: Settings, path: Path) -> CheckOutcome:
    """Every file there and as recorded: weights, configuration, code, card, licence, golden vectors."""
    return checks.model_sound(path)


STAGE = StageAsset(
    "hf_model",
    {"model_sound": model_sound},
)


@dg.asset(
    name="hf_model",
    deps=["projector_checkpoint", "retrieval_report"],
    automation_condition=after_inputs,
    check_specs=STAGE.check_specs(),
    group_name="publishing",
    kinds={"huggingface", "safetensors"},
    owners=OWNERS,
    code_version=code_version("hf_model"),
    pool=CPU_POOL,
    description=(
        "A Transformers model folder: weights, configuration, loading code, preprocessing, model card with the "
        "measured metrics, licence text, and golden vectors that are checked on load. Pushed to a hub only when "
        "`publishing.repo_id` is set. Its columns are its tensors.\n\n"
        "Source: projector_checkpoint, the backbone, retrieval_report. Licence: `publishing.license`, by default the "
        "backbone's. Grain: one model."
    ),
)
def hf_model(
    context: dg.AssetExecutionContext, settings: SettingsResource, compute: ComputeResource
) -> Iterator[dg.MaterializeResult[Any]]:
    """Publish the model."""
    yield from STAGE.whole(context, settings, compute)
