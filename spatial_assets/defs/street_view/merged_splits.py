"""`merged_splits`: all tars' features as train, val and test."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from spatial_assets.automation import from_all_keys
from spatial_assets.defs.resources import ComputeResource, SettingsResource
from spatial_assets.metadata import column_schema
from spatial_assets.stages import CPU_POOL, OWNERS, StageAsset, code_version
from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.quality import checks
from spatial_core.quality.outcome import CheckOutcome


def splits_sound(settings: Settings, path: Any) -> CheckOutcome:
    """No building or picture in two splits, no building with one picture, finite vectors, shares near the ratios."""
    return checks.splits_sound(path, settings)


STAGE = StageAsset(
    "merged_splits",
    {"splits_sound": splits_sound},
)


@dg.asset(
    name="merged_splits",
    deps=["backbone_embeddings"],
    automation_condition=from_all_keys("backbone_embeddings"),
    check_specs=STAGE.check_specs(),
    group_name="street_view",
    kinds={"parquet", "python"},
    owners=OWNERS,
    code_version=code_version("merged_splits"),
    pool=CPU_POOL,
    metadata={"dagster/column_schema": column_schema(schemas.splits(384, "float32"))},
    description=(
        "Features of all tars in `train`, `val` and `test` parquet files. A building lies in one split, the same one "
        "whatever tars are added later; buildings with a single picture are left out. Made from the tars that are "
        "there, whole tars at a time.\n\n"
        "Source: backbone_embeddings of all keys. Licence: that of the tars. Grain: one picture."
    ),
)
def merged_splits(
    context: dg.AssetExecutionContext, settings: SettingsResource, compute: ComputeResource
) -> Iterator[dg.MaterializeResult[Any]]:
    """Split the features of all tars."""
    yield from STAGE.whole(context, settings, compute)
