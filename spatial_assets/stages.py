"""The body that every asset shares: resolve paths, have the stage run, check the artifact, report it.

`StageAsset` says what one asset asks of its stage; `keys` and `whole` run it for partitioned and single artifacts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from spatial_assets.automation import unchanged_tag
from spatial_assets.compute.base import Outcome, Work, one_line
from spatial_assets.defs.resources import ComputeResource, SettingsResource
from spatial_assets.lost_runs import mark_worker
from spatial_assets.metadata import artifact_sha256, check_metadata, check_result, materialization_metadata
from spatial_assets.patience import outlasting_others
from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError, SpatialError
from spatial_core.jobs.registry import STAGES, StageCall
from spatial_core.lake.catalogue import CATALOGUE
from spatial_core.quality.outcome import CheckOutcome
from spatial_core.report import Report
from spatial_core.storage.withdraw import withdraw

Check = Callable[[Settings, Path], CheckOutcome]
Preview = Callable[[Settings, Report], Mapping[str, Any]]

OWNERS = ["team:spatial-embeddings"]
CPU_POOL = "cpu"
GPU_POOL = "gpu"


def code_version(asset: str) -> str:
    """Version of the algorithm behind an asset, from the table of stages."""
    return STAGES[CATALOGUE[asset].stage].code_version


def no_preview(settings: Settings, report: Report) -> Mapping[str, Any]:
    """No metadata beyond what every asset reports."""
    return {}


@dataclass(frozen=True)
class StageAsset:
    """What an asset asks of its stage.

    Args:
        name: asset name, as in the catalogue of the lake.
        checks: check name -> core check of (settings, artifact).
        preview: further metadata of the finished artifact, such as a picture.
    """

    name: str
    checks: Mapping[str, Check]
    preview: Preview = field(default=no_preview)

    def call(self, settings: Settings, key: str) -> StageCall:
        """The request for one artifact."""
        return CATALOGUE[self.name].call(settings, key)

    def judge(self, settings: Settings, artifact: Path) -> list[CheckOutcome]:
        """All checks of one artifact; an artifact that cannot even be read has failed."""
        outcomes = []
        for name, check in self.checks.items():
            try:
                outcomes.append(check(settings, artifact))
            except SpatialError as error:
                outcomes.append(CheckOutcome(name, False, str(error)))
        return outcomes

    def keys(
        self, context: dg.AssetExecutionContext, settings: SettingsResource, compute: ComputeResource
    ) -> Iterator[dg.MaterializeResult[Any]]:
        """Make the artifacts of all partition keys of the run.

        Dagster's asset checks know no partition in a run over a range, so each key's artifact is judged here, before it
        is reported; one that fails is withdrawn from the lake, where whatever reads a whole folder would find it.

        One bad key does not cost the others: those that were made are recorded, and the failure names the rest.
        """
        mark_worker(context.instance, context.run)
        tree = _load(context, settings)
        made: dict[str, Mapping[str, Any]] = {}
        failed: dict[str, str] = {}
        ran: Mapping[str, Any] = {}
        keys = list(context.partition_keys)
        try:
            for number, outcome in enumerate(self._run(context, compute, tree, keys), start=1):
                key = outcome.key
                try:
                    made[key] = self._accepted(tree, outcome)
                except SpatialError as error:
                    failed[key] = done = one_line(error)
                    ran = outcome.metadata
                else:
                    done = _done(outcome.result())
                level = logging.ERROR if key in failed else logging.INFO
                context.log.log(level, f"{self.name} {key} ({number} of {len(keys)}): {done}")
        except SpatialError as error:  # not one call, but the means to run them
            failed |= {key: one_line(error) for key in keys if key not in made and key not in failed}
        _tag_if_unchanged(context, made)
        if failed:
            for key, metadata in made.items():
                context.log_event(dg.AssetMaterialization(context.asset_key, partition=key, metadata=metadata))
            raise _failure(failed, made, ran)
        for key, metadata in made.items():
            context.add_asset_metadata(metadata, asset_key=context.asset_key, partition_key=key)
        # One data version would stand for all keys of a range, so Dagster derives each from the code and the inputs.
        yield dg.MaterializeResult()

    def whole(
        self,
        context: dg.AssetExecutionContext,
        settings: SettingsResource,
        compute: ComputeResource,
        make: Callable[[Settings], Outcome] | None = None,
    ) -> Iterator[dg.MaterializeResult[Any]]:
        """Make the one artifact of the asset and report its checks; blocking ones stop what follows.

        Args:
            context: of the run.
            settings: where to read them.
            compute: what runs the stage.
            make: makes the artifact where that is more than one call of the stage.
        """
        mark_worker(context.instance, context.run)
        tree = _load(context, settings)
        ran: Mapping[str, Any] = {}
        try:
            if make is None:
                (outcome,) = self._run(context, compute, tree, [""])
            else:
                outcome = make(tree)
            ran = outcome.metadata
            report = outcome.result()
            # What a person would rather look at stands first.
            metadata = dict(self.preview(tree, report)) | materialization_metadata(report, tree, partitioned=False)
            metadata |= ran
        except SpatialError as error:
            raise dg.Failure(one_line(error), metadata=ran, allow_retries=False) from error
        context.log.info(f"{self.name}: {_done(report)}")
        yield dg.MaterializeResult(
            metadata=metadata,
            data_version=dg.DataVersion(artifact_sha256(report.artifact)),
            check_results=[check_result(outcome) for outcome in self.judge(tree, report.artifact)],
        )

    def check_specs(self) -> list[dg.AssetCheckSpec]:
        """Declarations of the checks that `whole` reports, blocking."""
        return [
            dg.AssetCheckSpec(name, asset=self.name, blocking=True, description=(check.__doc__ or "").strip() or None)
            for name, check in self.checks.items()
        ]

    def _run(
        self, context: dg.AssetExecutionContext, compute: ComputeResource, settings: Settings, keys: Sequence[str]
    ) -> Iterator[Outcome]:
        """Have the stage run for some keys; what another process is writing just now is waited for."""
        work = Work(self.name, {key: self.call(settings, key) for key in keys})
        return outlasting_others(lambda asked: compute.run_all(context, asked), work, context.log.warning)

    def _accepted(self, settings: Settings, outcome: Outcome) -> dict[str, Any]:
        """Metadata of a sound artifact.

        Raises:
            SpatialError: why there is none.
            ArtifactError: naming the faults, after the artifact was withdrawn.
        """
        report = outcome.result()
        metadata = materialization_metadata(report, settings, partitioned=True)
        for verdict in self.judge(settings, report.artifact):
            metadata[verdict.name] = dg.MetadataValue.json(check_metadata(verdict))
            if not verdict.passed and verdict.severity == "error":
                raise withdraw(report.artifact, f"{verdict.name} failed: {verdict.summary}")
        return metadata | dict(outcome.metadata) | dict(self.preview(settings, report))


def _tag_if_unchanged(context: dg.AssetExecutionContext, made: Mapping[str, Mapping[str, Any]]) -> None:
    """Tag the run when every key was found as the instance knows it, for `automation.content_changed`.

    Called before anything is reported. An artifact that had to be computed counts as changed whatever its bytes: it was
    not there, so what was made from it may not be there either.
    """
    if not made:
        return
    unchanged = all(
        metadata["up_to_date"] and metadata["sha256"] == _last_sha256(context, key) for key, metadata in made.items()
    )
    tag = unchanged_tag(context.asset_key.to_user_string())
    if unchanged or tag in context.run.tags:  # a run that is started again inherits the tags of the one before
        context.instance.add_run_tags(context.run.run_id, {tag: str(unchanged).lower()})


def _last_sha256(context: dg.AssetExecutionContext, key: str) -> str | None:
    """The digest that the newest event of a key names."""
    newest = context.instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=context.asset_key, asset_partitions=[key]), limit=1
    ).records
    if not newest or newest[0].asset_materialization is None:
        return None
    recorded = newest[0].asset_materialization.metadata.get("sha256")
    return None if recorded is None else str(recorded.value)


def _done(report: Report) -> str:
    return "was up to date" if report.up_to_date else f"{report.rows:,} rows in {report.seconds:.1f} s"


def _load(context: dg.AssetExecutionContext, settings: SettingsResource) -> Settings:
    try:
        tree = settings.load()
    except ConfigError as error:
        raise dg.Failure(one_line(error), allow_retries=False) from error
    for note in tree.notices():
        context.log.info(note)
    return tree


def _failure(failed: Mapping[str, str], made: Mapping[str, Any], ran: Mapping[str, Any]) -> dg.Failure:
    """The failure that names the keys; `ran` says where the last of them ran."""
    if len(failed) == 1 and not made:
        return dg.Failure(next(iter(failed.values())), metadata=ran, allow_retries=False)
    causes = "; ".join(f"{key}: {cause}" for key, cause in failed.items())
    return dg.Failure(
        f"{len(failed)} of {len(failed) + len(made)} partitions failed ({causes})",
        metadata={"failed": dg.MetadataValue.json(dict(failed)), "made": dg.MetadataValue.json(sorted(made))},
        allow_retries=False,
    )
