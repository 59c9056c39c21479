"""`difficulty_metadata`: which other buildings look like a picture, and how much."""

from collections.abc import Iterator
from pathlib import Path
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


def difficulty_sound(settings: Settings, path: Path) -> CheckOutcome:
    """Lists of one length, bands 0 to 6, neighbours nearest first, every anchor once."""
    return checks.difficulty_sound(path)


STAGE = StageAsset(
    "difficulty_metadata",
    {"difficulty_sound": difficulty_sound},
)


@dg.asset(
    name="difficulty_metadata",
    deps=["fingerprints"],
    automation_condition=from_all_keys("fingerprints"),
    check_specs=STAGE.check_specs(),
    group_name="street_view",
    kinds={"parquet", "faiss"},
    owners=OWNERS,
    code_version=code_version("difficulty_metadata"),
    pool=CPU_POOL,
    metadata={"dagster/column_schema": column_schema(schemas.DIFFICULTY)},
    description=(
        "The visually nearest pictures of other buildings for every picture, in seven bands from hardest to easiest; "
        "buildings nearer than `data.min_negative_distance_m` on the ground never count as others.\n\n"
        "Source: fingerprints of all keys. Licence: that of the tars. Grain: one picture."
    ),
)
def difficulty_metadata(
    context: dg.AssetExecutionContext, settings: SettingsResource, compute: ComputeResource
) -> Iterator[dg.MaterializeResult[Any]]:
    """Search the neighbours of all fingerprints."""
    yield from STAGE.whole(context, settings, compute)
