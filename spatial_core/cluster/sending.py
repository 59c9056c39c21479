"""Sends calls to the cluster, each once.

What is on its way already, from another run or from one whose process died, is found in the ledger and followed.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spatial_core.cluster.ending import TERMINAL
from spatial_core.cluster.following import Observer
from spatial_core.cluster.identity import destination, identity
from spatial_core.cluster.ledger import Ledger, SubmissionRecord, TaskRecord, now
from spatial_core.cluster.resources import Resources
from spatial_core.cluster.scheduler import Look, Scheduler, UnclearSubmission
from spatial_core.cluster.script import Submission, render
from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterError
from spatial_core.jobs.registry import StageCall

INTENT_S = 120.0  # a submission that nobody is making any more and that has no job id: its job may still turn up
_TASKS_A_JOB = 1000  # SLURM's default MaxArraySize is 1001
_FIND_EVERY_S = 2.0


@dataclass(frozen=True)
class Sent:
    """Where calls are now.

    Args:
        tasks: partition key -> task on the cluster.
        refused: partition key -> why the cluster did not take it.
    """

    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    refused: dict[str, ClusterError] = field(default_factory=dict)


class Sender:
    """Sends calls of one asset for one run.

    Args:
        settings: of the calls.
        asset: asset name.
        scheduler: the cluster.
        ledger: of what is on it.
        observer: told of every submission.
        python: interpreter on the nodes.
        run_id: Dagster run that asks.
        job_name: its Dagster job.
        rendered: makes a submission of calls, as `script.render` does.
        pause: waits; replaced in tests.
    """

    def __init__(
        self,
        settings: Settings,
        asset: str,
        scheduler: Scheduler,
        ledger: Ledger,
        observer: Observer,
        *,
        python: Path,
        run_id: str,
        job_name: str,
        rendered: Callable[..., Submission] = render,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._asset = asset
        self._scheduler = scheduler
        self._ledger = ledger
        self._observer = observer
        self._python = python
        self._run_id = run_id
        self._job_name = job_name
        self._rendered = rendered
        self._pause = pause
        self.own: dict[str, SubmissionRecord] = {}

    def send(self, calls: Mapping[str, StageCall], resources: Resources) -> Sent:
        """Submit what is not on its way.

        Raises:
            ClusterError: if the cluster cannot be asked, or refuses everything.
        """
        identities = {key: identity(self._asset, key, call) for key, call in calls.items()}
        sent = Sent()
        with self._ledger.sending():
            self._end_outdated(identities, {key: destination(call) for key, call in calls.items()})
            for record, tasks in self._on_their_way(identities):
                followed = self._taken_over(record)
                sent.tasks.update((task.key, TaskRecord(followed, task.index)) for task in tasks)
            missing = [key for key in calls if key not in sent.tasks]
            for begin in range(0, len(missing), _TASKS_A_JOB):
                keys = missing[begin : begin + _TASKS_A_JOB]
                try:
                    record = self._submit({key: calls[key] for key in keys}, identities, resources)
                except ClusterError as error:
                    if not sent.tasks:
                        raise
                    sent.refused.update(dict.fromkeys(missing[begin:], error))
                    break
                sent.tasks.update((task.key, task) for task in record.open_tasks)
        return sent

    def cancel(self) -> int:
        """Cancel everything this run has sent and nobody has settled; returns the number of tasks.

        Raises:
            ClusterError: if the scheduler could not do it.
        """
        mine = [record for record in self._ledger.submissions() if self._is_own(record)]
        return sum(cancel_submission(record, self._scheduler, self._ledger) for record in mine)

    def _is_own(self, record: SubmissionRecord) -> bool:
        return record.run_id == self._run_id and record.asset == self._asset

    def _taken_over(self, record: SubmissionRecord) -> SubmissionRecord:
        """A submission to follow; one whose own run has ended is this run's from now on."""
        self._observer.submitted(record, attached=True)
        if record.run_id != self._run_id:
            if self._observer.in_progress(record.run_id):
                return record
            record = self._ledger.adopt(record, self._run_id)
        self.own[record.name] = record
        return record

    def _submit(
        self, calls: dict[str, StageCall], identities: Mapping[str, str], resources: Resources
    ) -> SubmissionRecord:
        name = f"spatial-{self._asset.replace('_', '-')}-{uuid.uuid4().hex[:10]}"
        submission = self._rendered(
            self._asset, calls, resources, self._settings,
            name=name, python=self._python, run_id=self._run_id, job_name=self._job_name,
        )  # fmt: skip
        record = SubmissionRecord(
            name, self._asset, submission.folder, self._run_id, submission.keys,
            tuple(identities[key] for key in submission.keys), now(),
            destinations=tuple(destination(calls[key]) for key in submission.keys),
        )  # fmt: skip
        self._ledger.intend(record)
        try:
            job = self._scheduler.submit(submission)
        except UnclearSubmission:
            raise  # the intent stays: whoever asks next looks for the job by its name
        except ClusterError:
            self._ledger.withdraw(record)
            raise
        record = self._ledger.submitted(record, job)
        self.own[record.name] = record
        self._observer.submitted(record, attached=False)
        return record

    def _on_their_way(self, identities: Mapping[str, str]) -> list[tuple[SubmissionRecord, list[TaskRecord]]]:
        """Requests whose job is waiting, running or has ended well, by submission; the others are given up."""
        sent: dict[str, list[int]] = {}
        records: dict[str, SubmissionRecord] = {}
        for task in self._ledger.find(identities).values():
            sent.setdefault(task.submission.name, []).append(task.index)
            records[task.submission.name] = task.submission
        alive = [
            (known, [TaskRecord(known, index) for index in sent[name]])
            for name, record in records.items()
            if (known := self._with_job(record)) is not None
        ]
        if not alive:
            return []
        look = self._scheduler.look({task.task_id: (None, 0) for _, tasks in alive for task in tasks})
        if look.silent:
            # Followed until the scheduler answers: to submit now might be to submit twice.
            return alive
        lost = [task for _, tasks in alive for task in tasks if not self._worth_following(look, task)]
        for task in lost:
            accounted = look.accounts.get(task.task_id)
            end = "is known to nobody" if accounted is None else f"ended {accounted.state}"
            said = f"job {task.task_id} of an earlier run {end}; it is sent again"
            self._observer.log(logging.INFO, task.label(said))
        self._ledger.give_up(lost)
        gone = set(lost)
        kept = [(record, [task for task in tasks if task not in gone]) for record, tasks in alive]
        return [(record, tasks) for record, tasks in kept if tasks]

    def _worth_following(self, look: Look, task: TaskRecord) -> bool:
        """Whether a job that was sent earlier still runs, or ended well; else the request has to be sent again."""
        if task.task_id in look.queue:
            return True
        accounted = look.accounts.get(task.task_id)
        if accounted is None:  # accounting hears of a job a little after the queue
            return now() - task.submission.at < self._settings.compute.vanished_after_s
        return accounted.state == "COMPLETED" or accounted.state not in TERMINAL

    def _end_outdated(self, identities: Mapping[str, str], destinations: Mapping[str, str]) -> None:
        """Cancel what a run that has ended left on the cluster for these keys, with inputs or settings of then."""
        outdated: dict[str, list[TaskRecord]] = {}
        for task in self._ledger.outdated(self._asset, identities, destinations):
            if self._observer.has_ended(task.submission.run_id):
                outdated.setdefault(task.submission.name, []).append(task)
        for tasks in outdated.values():
            record = self._with_job(tasks[0].submission)
            if record is None:
                continue
            for task in (TaskRecord(record, task.index) for task in tasks):
                said = f"job {task.task_id} of an earlier run was for other inputs or settings; cancelled"
                self._observer.log(logging.WARNING, task.label(said))
            give_up(record, [TaskRecord(record, task.index) for task in tasks], self._scheduler, self._ledger)

    def _with_job(self, record: SubmissionRecord) -> SubmissionRecord | None:
        """A submission with its job id; None when it never took place. The ledger is held: nobody is submitting it."""
        while record.job is None:
            jobs = self._scheduler.find(record.name)
            if jobs:
                return self._ledger.submitted(record, jobs[0])
            if now() - record.at > INTENT_S:
                self._ledger.withdraw(record)
                return None
            self._pause(_FIND_EVERY_S)
        return record


def cancel_submission(record: SubmissionRecord, scheduler: Scheduler, ledger: Ledger) -> int:
    """Cancel the open tasks of a submission and give them up.

    Returns:
        Their number.

    Raises:
        UnclearSubmission: if it has no job id and it is too early to say that there is no job.
        ClusterError: if the scheduler could not do it.
    """
    if record.job is None:
        jobs = scheduler.find(record.name)
        if not jobs and now() - record.at < INTENT_S:
            raise UnclearSubmission(f"it is not known yet whether job {record.name} was taken")
        if not jobs:
            ledger.withdraw(record)
            return 0
        record = ledger.submitted(record, jobs[0])
    tasks = record.open_tasks
    give_up(record, tasks, scheduler, ledger)
    return len(tasks)


def give_up(record: SubmissionRecord, tasks: Sequence[TaskRecord], scheduler: Scheduler, ledger: Ledger) -> None:
    """Cancel tasks of a submission and give them up.

    Raises:
        ClusterError: if the scheduler could not do it.
    """
    whole = len(tasks) == len(record.keys)
    scheduler.cancel([str(record.job)] if whole else [task.task_id for task in tasks])
    ledger.give_up(tasks)
