"""Stages as jobs of a cluster, followed in the run's event log: several calls as a job array, one as a plain job."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg

from spatial_assets.compute.accounting import job_metadata
from spatial_assets.compute.base import Outcome, Work
from spatial_core.cluster.building import ready_python
from spatial_core.cluster.engine import Engine
from spatial_core.cluster.identity import destination, identity
from spatial_core.cluster.ledger import Ledger, SubmissionRecord
from spatial_core.cluster.made import MadeBefore
from spatial_core.cluster.scheduler import Scheduler
from spatial_core.cluster.transport import transport_for
from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterError
from spatial_core.jobs.registry import StageCall
from spatial_core.lake.catalogue import CATALOGUE
from spatial_core.storage.atomic import busy, in_other_hands

JOB_TAG = "cluster_job/{asset}"
_ENDING = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


class ClusterJobs:
    """Sends what is missing: one call as a plain job, several as one array. What was made before is found here."""

    def run_all(self, context: dg.AssetExecutionContext, work: Work) -> Iterator[Outcome]:
        jobs_dir = next(iter(work.calls.values())).settings.jobs_dir
        made = MadeBefore(jobs_dir, work.asset)
        asked = {key: identity(work.asset, key, call) for key, call in work.calls.items()}
        missing = dict(work.calls)
        # A job that is on its way has to be followed to its end, or nobody would take note of it.
        ledger = Ledger(jobs_dir)
        on_their_way = ledger.find(asked)
        # Workers that share something are asked for because there is more to do, whatever they made before.
        for key in () if work.side_by_side else [key for key in asked if key not in on_their_way]:
            if (report := made.find(key, asked[key])) is not None:
                del missing[key]
                yield Outcome(key, report)
        destinations = {key: destination(call) for key, call in work.calls.items()}
        outdated = ledger.outdated(work.asset, asked, destinations)
        left = {task.key for task in outdated if has_ended(context, task.submission.run_id)}
        for key, artifact in _written_by_others(work, missing.keys() - on_their_way.keys() - left):
            del missing[key]
            yield Outcome(key, error=busy(artifact))
        if not missing:
            return
        for outcome in one_or_many(missing).run_all(context, replace(work, calls=missing)):
            if outcome.report is not None:
                made.note(outcome.key, asked[outcome.key], outcome.report)
            yield outcome


def _written_by_others(work: Work, keys: Iterable[str]) -> list[tuple[str, Path]]:
    """Keys whose artifact another process is writing just now, with the artifact: a job would only find that out."""
    if work.side_by_side:
        return []
    paths = {key: CATALOGUE[work.asset].path(work.calls[key].settings.locations, key) for key in keys}
    return [(key, path) for key, path in sorted(paths.items()) if in_other_hands(path)]


def has_ended(context: dg.AssetExecutionContext, run_id: str) -> bool:
    """Whether a run is known to have ended; one of another Dagster is not known."""
    run = context.instance.get_run_by_id(run_id)
    return run is not None and run.is_finished


def one_or_many(calls: Mapping[str, StageCall]) -> SingleJob | JobArray:
    """How calls are sent."""
    return SingleJob() if len(calls) == 1 else JobArray()


class JobArray:
    """Runs the calls of an asset as one job array."""

    def run_all(self, context: dg.AssetExecutionContext, work: Work) -> Iterator[Outcome]:
        settings = next(iter(work.calls.values())).settings
        engine = engine_for(context, work.asset, settings, Follower(context))
        with ending_together(context, engine):
            for done in engine.run(work.calls):
                yield Outcome(done.key, done.report, done.error, job_metadata(work.asset, done, settings.compute))


class SingleJob:
    """Runs the only call of an asset as a plain job, through dagster-slurm."""

    def run_all(self, context: dg.AssetExecutionContext, work: Work) -> Iterator[Outcome]:
        from spatial_assets.compute.dagster_slurm_client import HardenedSlurmPipesClient, JobFailure

        ((key, call),) = work.calls.items()
        client = HardenedSlurmPipesClient(work.asset, call.settings)
        try:
            invocation = client.run(context=context, call=call, key=key)
        except JobFailure as failure:
            yield Outcome(key, error=failure.error, metadata=failure.metadata)
        else:
            yield Outcome(key, invocation.report, metadata=invocation.metadata)


class Follower:
    """Shows what happens in the run's event log, and keeps job ids as tags of the run."""

    def __init__(self, context: dg.AssetExecutionContext) -> None:
        self._context = context
        self._jobs: list[str] = []

    def log(self, level: int, text: str) -> None:
        """Show a line."""
        self._context.log.log(level, text)

    def in_progress(self, run_id: str) -> bool:
        """Whether another run still follows the jobs it submitted."""
        run = self._context.instance.get_run_by_id(run_id)
        return run is not None and not run.is_finished

    def has_ended(self, run_id: str) -> bool:
        """Whether another run is known to have ended."""
        return has_ended(self._context, run_id)

    def submitted(self, submission: SubmissionRecord, *, attached: bool) -> None:
        """A job was submitted, or found to be on its way."""
        self._jobs.append(str(submission.job))
        how = f"follows job {submission.job} of run {submission.run_id}" if attached else f"job {submission.job}"
        tasks = len(submission.keys)
        self._context.log.info(
            f"{submission.asset}: {how}{f', {tasks} tasks' if tasks > 1 else ''} in {submission.folder}; "
            f"look at it with: squeue -j {submission.job} or: sacct -j {submission.job}"
        )
        tag = JOB_TAG.format(asset=submission.asset)
        self._context.instance.add_run_tags(self._context.run.run_id, {tag: ",".join(self._jobs)})


def engine_for(
    context: dg.AssetExecutionContext, asset: str, settings: Settings, follower: Follower, **how: Any
) -> Engine:
    """The engine for the calls of one asset in a run; `how` are further arguments of the engine.

    Raises:
        ClusterError: if the interpreter for jobs does not have the code of this process, and cannot be made.
    """
    scheduler = scheduler_for(settings, lambda text: follower.log(logging.WARNING, text))
    python = ready_python(settings, scheduler, lambda text: follower.log(logging.INFO, text))
    return Engine(
        settings, asset, scheduler, follower,
        python=python, run_id=context.run.run_id, job_name=context.run.job_name, **how,
    )  # fmt: skip


@contextmanager
def ending_together(context: dg.AssetExecutionContext, engine: Engine) -> Iterator[None]:
    """A run that is terminated cancels its jobs.

    A run whose process ends for any other reason (machine restarted, daemon stopped) leaves them alone: the next run of
    the same partitions finds and follows them.
    """
    try:
        yield
    except BaseException:
        _leave(context, engine)
        raise


def _leave(context: dg.AssetExecutionContext, engine: Engine) -> None:
    """The run ends before its jobs: cancel them only if that is what was asked for."""
    run = context.instance.get_run_by_id(context.run.run_id)
    if run is None or run.status not in _ENDING:
        context.log.warning("this run ends before its jobs; they go on and the next run of these partitions finds them")
        return
    try:
        engine.cancel()
    except ClusterError as error:
        context.log.warning(f"the jobs could not be cancelled ({error}); the cluster_jobs sensor will try again")


def scheduler_for(settings: Settings, warn: Callable[[str], None]) -> Scheduler:
    """The cluster that the settings name."""
    return Scheduler(transport_for(settings), warn, settings.compute.accounting_patience_s)
