"""Stages as jobs of a cluster: the calls of one run are one job array, followed in the run's event log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg

from spatial_assets.compute.base import Outcome, Work
from spatial_core.cluster.ending import Ending, usage_record
from spatial_core.cluster.engine import Done, Engine
from spatial_core.cluster.environment import node_python
from spatial_core.cluster.ledger import SubmissionRecord
from spatial_core.cluster.scheduler import Scheduler
from spatial_core.cluster.transport import transport_for
from spatial_core.config.compute import ComputeSection
from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterError

JOB_TAG = "spatial/cluster_job"
_ENDING = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


class ClusterJobs:
    """Runs the calls of an asset as one job array.

    A run that is terminated cancels its jobs. A run whose process ends for any other reason (machine restarted, daemon
    stopped) leaves them alone: the next run of the same partitions finds and follows them.
    """

    def run_all(self, context: dg.AssetExecutionContext, work: Work) -> Iterator[Outcome]:
        settings = next(iter(work.calls.values())).settings
        follower = _Follower(context)
        scheduler = scheduler_for(settings, lambda text: follower.log(logging.WARNING, text))
        engine = Engine(
            settings,
            work.asset,
            scheduler,
            follower,
            python=node_python(settings),
            run_id=context.run_id,
            job_name=context.job_name,
        )
        try:
            for done in engine.run(work.calls):
                yield _outcome(work.asset, done, settings.compute)
        except BaseException:
            self._leave(context, engine)
            raise

    def _leave(self, context: dg.AssetExecutionContext, engine: Engine) -> None:
        """The run ends before its jobs: cancel them only if that is what was asked for."""
        run = context.instance.get_run_by_id(context.run_id)
        if run is None or run.status not in _ENDING:
            context.log.warning(
                "this run ends before its jobs; they go on and the next run of these partitions finds them"
            )
            return
        try:
            engine.cancel()
        except ClusterError as error:
            context.log.warning(f"the jobs could not be cancelled ({error}); the cluster_jobs sensor will try again")


def scheduler_for(settings: Settings, warn: Callable[[str], None]) -> Scheduler:
    """The cluster that the settings name."""
    return Scheduler(transport_for(settings), warn, settings.compute.accounting_patience_s)


class _Follower:
    """Shows what happens in the run's event log, and keeps job ids as tags of the run."""

    def __init__(self, context: dg.AssetExecutionContext) -> None:
        self._context = context
        self._jobs: list[str] = []

    def log(self, level: int, text: str) -> None:
        self._context.log.log(level, text)

    def in_progress(self, run_id: str) -> bool:
        run = self._context.instance.get_run_by_id(run_id)
        return run is not None and not run.is_finished

    def submitted(self, submission: SubmissionRecord, *, attached: bool) -> None:
        self._jobs.append(str(submission.job))
        how = f"follows job {submission.job} of run {submission.run_id}" if attached else f"job {submission.job}"
        self._context.log.info(
            f"{submission.asset}: {how}, {len(submission.keys)} tasks in {submission.folder}; "
            f"look at it with: squeue -j {submission.job} or: sacct -j {submission.job}"
        )
        self._context.instance.add_run_tags(self._context.run_id, {JOB_TAG: ",".join(self._jobs)})


def _outcome(asset: str, done: Done, compute: ComputeSection) -> Outcome:
    metadata = {} if done.ending is None else _metadata(asset, done, done.ending, compute)
    return Outcome(done.key, done.report, done.error, metadata)


def _metadata(asset: str, done: Done, ending: Ending, compute: ComputeSection) -> dict[str, Any]:
    """Where and at what cost an artifact was made."""
    record = usage_record(ending, asset, done.key, done.usage, (compute.cost_per_gpu_hour, compute.cost_per_cpu_hour))
    shown = {"job": ending.task_id, "job_accounting": dg.MetadataValue.text(f"sacct -j {ending.task_id} --format=ALL")}
    names = ("node", "elapsed_s", "cpu_s", "core_s", "gpu_s", "memory_mb", "gpu_utilisation", "cost")
    return shown | {f"job_{name}": record[name] for name in names if record[name] not in (None, "")}
