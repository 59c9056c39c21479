"""The sensor that looks after cluster jobs whose Dagster run has ended: nothing is left running unasked, nothing that
finished is left unrecorded, and nothing is computed twice for it.
"""

from __future__ import annotations

import dagster as dg

from spatial_assets.compute.cluster import scheduler_for
from spatial_assets.defs.resources import SettingsResource
from spatial_assets.partitions import RANGE_TAGS
from spatial_core.cluster.accounting import account_for_given_up
from spatial_core.cluster.ledger import Ledger, SubmissionRecord, TaskRecord
from spatial_core.cluster.sending import cancel_submission
from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterError
from spatial_core.lake.catalogue import CATALOGUE

_TERMINATED = {dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED}
_RETRY_OF = "dagster/parent_run_id"
_WILL_RETRY = "dagster/will_retry"
FOLLOWS_TAG = "spatial/follows"
_MOST_TRIES = 5


# One run has one kind of partition, so there is a job for each. They are for the sensor alone.
JOBS = {
    partition: dg.define_asset_job(
        f"follow_{partition or 'single'}",
        selection=dg.AssetSelection.assets(
            *[kind.name for kind in CATALOGUE.values() if kind.stage and kind.partition == partition]
        ),
        description="Run by the cluster_jobs sensor: follows jobs whose own run was lost.",
    )
    for partition in ("tar", "drop", None)
}
follow_jobs = list(JOBS.values())


@dg.sensor(
    name="cluster_jobs",
    jobs=follow_jobs,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Looks at jobs whose Dagster run has ended. Jobs of a terminated run are cancelled. For jobs of a run whose "
        "process was lost, a new run of the same partitions is requested: it follows them, or records what they made."
    ),
)
def cluster_jobs(context: dg.SensorEvaluationContext, settings: SettingsResource) -> dg.SensorResult | dg.SkipReason:
    """One look at the ledger of submitted jobs."""
    tree = settings.load()
    if tree.compute.profile == "local":
        return dg.SkipReason("compute.profile is local")
    ledger = Ledger(tree.jobs_dir)
    _account(context, tree)
    requests: list[dg.RunRequest] = []
    left: list[str] = []
    for submission in ledger.submissions():
        run = context.instance.get_run_by_id(submission.run_id)
        if run is not None and run.status in _TERMINATED and run.is_finished:
            _cancel(context, tree, ledger, submission)
        elif run is not None and (not run.is_finished or _retried(context.instance, run)):
            continue
        else:
            tried = context.instance.get_runs(dg.RunsFilter(tags={FOLLOWS_TAG: _name_of(submission)}))
            if any(not follower.is_finished for follower in tried):
                continue
            if len(tried) >= _MOST_TRIES * len(submission.keys):
                context.log.warning(f"{submission.name}: no run takes note of its jobs; materialize {submission.asset}")
                continue
            left.append(str(submission.job or submission.name))
            requests += _requests(context.instance, submission, submission.open_tasks, len(tried))
    if not requests:
        return dg.SkipReason("every job belongs to a run in progress")
    context.log.info(f"run ended before its jobs: {', '.join(left)}; following them")
    return dg.SensorResult(run_requests=requests)


def _account(context: dg.SensorEvaluationContext, settings: Settings) -> None:
    """Keep what cancelled jobs used, which accounting knows a little after they were cancelled."""
    try:
        account_for_given_up(settings, scheduler_for(settings, context.log.warning))
    except ClusterError as error:
        context.log.warning(f"what cancelled jobs used is not known yet: {error}")


def _retried(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether Dagster itself starts the run again, or has: the new run follows the jobs."""
    retries = instance.get_runs(dg.RunsFilter(tags={_RETRY_OF: run.run_id}))
    if not retries:
        return run.tags.get(_WILL_RETRY) == "true"
    return any(not retry.is_finished for retry in retries)


def _name_of(submission: SubmissionRecord) -> str:
    """Names a submission in the hands of a run: followers of a lost one are told from those of the next."""
    return f"{submission.name}/{submission.run_id}"


def _requests(
    instance: dg.DagsterInstance, submission: SubmissionRecord, tasks: list[TaskRecord], tried: int
) -> list[dg.RunRequest]:
    """A run of the tasks' partitions, as one range where they are neighbours.

    Asked for once for each lost run, and again when that came to nothing: `tried` runs have ended by now.
    """
    keys = [task.key for task in tasks]
    tags = {FOLLOWS_TAG: _name_of(submission)}
    name = f"{_name_of(submission)}/{tried}"
    partition = CATALOGUE[submission.asset].partition
    job = JOBS[partition].name
    selection = [dg.AssetKey(submission.asset)]
    known = instance.get_dynamic_partitions(partition) if partition else []
    first = known.index(keys[0]) if keys[0] in known else 0
    if len(keys) > 1 and list(known[first : first + len(keys)]) == keys:
        tags |= zip(RANGE_TAGS, (keys[0], keys[-1]), strict=True)
        return [dg.RunRequest(run_key=name, job_name=job, asset_selection=selection, tags=tags)]
    return [
        dg.RunRequest(f"{name}/{key}", job_name=job, asset_selection=selection, partition_key=key or None, tags=tags)
        for key in keys
    ]


def _cancel(
    context: dg.SensorEvaluationContext, settings: Settings, ledger: Ledger, submission: SubmissionRecord
) -> None:
    """A terminated run left these behind, because its process was killed before it could cancel them."""
    try:
        cancelled = cancel_submission(submission, scheduler_for(settings, context.log.warning), ledger)
    except ClusterError as error:
        context.log.warning(f"jobs of the terminated run {submission.run_id} could not be cancelled yet: {error}")
        return
    context.log.info(f"cancelled {cancelled} tasks of {submission.name}: run {submission.run_id} was terminated")
