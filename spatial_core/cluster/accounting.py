"""What jobs used, one line for each attempt of a job, in `usage.jsonl` in the folder of jobs.

The run that follows a job writes its line. A job that was given up, because it was cancelled or because it had ended
badly while nobody followed it, stands in the ledger until somebody who looks at the cluster next has written its line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from spatial_core.cluster.ending import TERMINAL, VANISHED, Ending, ending_of, usage_record
from spatial_core.cluster.ledger import Ledger, TaskRecord, now
from spatial_core.cluster.scheduler import Look, Scheduler
from spatial_core.config.settings import Settings


def keep_usage(settings: Settings, task: TaskRecord, ending: Ending, said: Mapping[str, Any]) -> None:
    """Append what a task used, at the prices of the settings; the lines are written in one piece.

    Args:
        settings: of the task.
        task: the task.
        ending: how it ended.
        said: what the last attempt itself reported of its use.
    """
    prices = (settings.compute.cost_per_gpu_hour, settings.compute.cost_per_cpu_hour)
    reported = [*({} for _ in ending.earlier), said]
    records = [
        usage_record(attempt, task.submission.asset, task.key, its, prices)
        for attempt, its in zip(ending.attempts, reported, strict=True)
    ]
    with settings.locations.usage_file.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def account_for_given_up(settings: Settings, scheduler: Scheduler) -> int:
    """Write the lines of tasks that were given up and have ended since.

    Args:
        settings: of the lake.
        scheduler: asked once, if there is such a task.

    Returns:
        Lines written.

    Raises:
        ClusterError: if the cluster cannot be asked.
    """
    ledger = Ledger(settings.jobs_dir)
    tasks = [task for submission in ledger.unaccounted() for task in submission.open_tasks]
    if not tasks:
        return 0
    look = scheduler.look({task.task_id: (None, 0) for task in tasks})
    if look.silent:
        return 0
    ended = [(task, ending) for task in tasks if (ending := _ending(look, task, settings)) is not None]
    for task, ending in ended:
        keep_usage(settings, task, ending, {})
    ledger.accounted(task for task, _ in ended)
    return len(ended)


def _ending(look: Look, task: TaskRecord, settings: Settings) -> Ending | None:
    """How a task that was given up has ended; None while it has not, or accounting does not know all of it."""
    if task.task_id in look.queue:
        return None
    waited = now() - task.submission.at > settings.compute.vanished_after_s
    accounted = look.accounts.get(task.task_id)
    if accounted is not None and accounted.state in TERMINAL and (accounted.complete or waited):
        return ending_of(task.task_id, accounted)
    return Ending(task.task_id, VANISHED) if accounted is None and waited else None
