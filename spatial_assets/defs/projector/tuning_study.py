"""`tuning_study`: the search for the projector's hyper-parameters, made when a person asks for it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from spatial_assets.compute.accounting import summed
from spatial_assets.compute.base import Outcome, Work, one_line
from spatial_assets.defs.resources import ComputeResource, SettingsResource
from spatial_assets.metadata import column_schema
from spatial_assets.stages import GPU_POOL, OWNERS, StageAsset, code_version
from spatial_assets.study_preview import study_preview
from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.jobs.pacing import PacedProgress
from spatial_core.jobs.registry import StageCall
from spatial_core.quality import checks
from spatial_core.quality.outcome import CheckOutcome


def study_sound(settings: Settings, path: Path) -> CheckOutcome:
    """The study as recorded, and its best trial the best."""
    return checks.study_sound(path)


STAGE = StageAsset("tuning_study", {"study_sound": study_sound}, preview=study_preview)


@dg.asset(
    name="tuning_study",
    deps=["merged_splits", "difficulty_metadata"],
    check_specs=STAGE.check_specs(),
    metadata={"dagster/column_schema": column_schema(schemas.TRIALS)},
    group_name="projector",
    kinds={"optuna", "postgres", "mlflow"},
    owners=OWNERS,
    code_version=code_version("tuning_study"),
    pool=GPU_POOL,
    description=(
        "A search for the projector's hyper-parameters with Optuna: trials that workers train side by side, each "
        "measured on the same queries of the validation split, hopeless ones ended early. Its best trial is what "
        "projector_checkpoint trains with. It is never requested automatically, for it costs many trainings; "
        "materialized again with the same inputs and settings it goes on, and with a higher tuning.trials it adds "
        "trials.\n\n"
        "Source: merged_splits (train, val) and difficulty_metadata. Licence: the project's, within the tars' terms. "
        "Grain: one trial."
    ),
)
def tuning_study(
    context: dg.AssetExecutionContext, settings: SettingsResource, compute: ComputeResource
) -> Iterator[dg.MaterializeResult[Any]]:
    """Run workers until the study has its trials, then write down what it came to."""
    # Optuna takes a second to import, which only a run should pay.
    from spatial_core.tuning.orchestrate import conduct

    ran: list[Mapping[str, Any]] = []

    def run_workers(calls: dict[str, StageCall]) -> Mapping[str, str]:
        failures = {}
        ran.clear()
        for outcome in compute.run_all(context, Work("tuning_study", calls, side_by_side=True)):
            ran.append(outcome.metadata)
            if outcome.error is not None:
                failures[outcome.key] = one_line(outcome.error)
            context.log.info(f"tuning_study worker {outcome.key}: {failures.get(outcome.key, 'done')}")
        return failures

    def make(tree: Settings) -> Outcome:
        paced = PacedProgress(context.log.info)
        return Outcome("", report=conduct(STAGE.call(tree, ""), run_workers, paced), metadata=summed(ran))

    yield from STAGE.whole(context, settings, compute, make)
