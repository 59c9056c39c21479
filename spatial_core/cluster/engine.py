"""Runs the stage calls of one asset on a cluster, from submission to verified artifacts.

A call is sent once however often it is asked for: what is on its way already, from another run or from one whose
process died, is followed instead (`ledger`). A task has succeeded when accounting says COMPLETED *and* the stage's
report has arrived *and* the artifact lies in place with the digest of its manifest; nothing less counts, and while the
scheduler is silent nothing is concluded.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from spatial_core.cluster.ending import (
    TERMINAL,
    VANISHED,
    Ending,
    ending_of,
    failure_of,
    usage_record,
)
from spatial_core.cluster.identity import identity
from spatial_core.cluster.ledger import Ledger, SubmissionRecord, TaskRecord, now
from spatial_core.cluster.resources import Resources, resources_for
from spatial_core.cluster.scheduler import Look, Scheduler, UnclearSubmission
from spatial_core.cluster.script import Submission, log_file, render
from spatial_core.config.settings import Settings
from spatial_core.errors import (
    ArtifactError,
    ClusterError,
    ClusterUnreachable,
    JobFailed,
    JobOutOfMemory,
    JobTimedOut,
    SpatialError,
)
from spatial_core.jobs.messages import Said
from spatial_core.jobs.pipes import failure_from
from spatial_core.jobs.registry import StageCall
from spatial_core.report import Report
from spatial_core.storage.provenance import artifact_digest, read_manifest

_INTENT_S = 60.0  # a submission without a job id that nobody holds: how long its job may still turn up
_SETTLE_S = 20.0  # for reports and artifacts to be seen through a network file system after the job has ended
_TASKS_A_JOB = 1000  # SLURM's default MaxArraySize is 1001
_PATIENCE = 1.3  # factor by which looks grow rarer while nothing happens
_RESUMPTIONS = 50  # of a job that saved its pieces before its time limit; each has got further


class Observer(Protocol):
    """Who follows the work: the Dagster run."""

    def log(self, level: int, text: str) -> None:
        """Show a line."""
        ...

    def submitted(self, submission: SubmissionRecord, *, attached: bool) -> None:
        """A job was submitted, or found to be on its way."""
        ...

    def in_progress(self, run_id: str) -> bool:
        """Whether another run still follows the jobs it submitted."""
        ...


@dataclass(frozen=True)
class Done:
    """How one call ended: report or error, the accounting of its last attempt, and the log of one that failed."""

    key: str
    report: Report | None = None
    error: SpatialError | None = None
    ending: Ending | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    log: str = ""


@dataclass
class _Watch:
    """A task that is being followed."""

    record: TaskRecord
    call: StageCall
    resources: Resources
    own: bool
    said: Said
    offset: int = 0
    state: str = ""
    absent_since: float | None = None
    ended_at: float | None = None

    @property
    def messages(self) -> str:
        return f"{self.record.submission.folder}/messages/{self.record.index}.jsonl"

    @property
    def log(self) -> str:
        return log_file(self.record.submission.folder, self.record.index)


class Engine:
    """One asset's calls on one cluster.

    Args:
        settings: of the calls.
        asset: asset name.
        scheduler: the cluster.
        observer: who follows.
        python: interpreter on the nodes.
        run_id: Dagster run that asks.
        job_name: its Dagster job.
        rendered: makes a submission of calls, as `script.render` does.
        heard: makes what takes in the messages of one task.
        pause: waits; replaced in tests.
    """

    def __init__(
        self,
        settings: Settings,
        asset: str,
        scheduler: Scheduler,
        observer: Observer,
        *,
        python: Path,
        run_id: str,
        job_name: str = "__ASSET_JOB",
        rendered: Callable[..., Submission] = render,
        heard: Callable[[], Said] = Said,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._compute = settings.compute
        self._asset = asset
        self._scheduler = scheduler
        self._observer = observer
        self._python = python
        self._run_id = run_id
        self._job_name = job_name
        self._rendered = rendered
        self._heard = heard
        self._pause = pause
        self._ledger = Ledger(settings.jobs_dir)
        self._open: dict[str, _Watch] = {}
        self._settled: list[TaskRecord] = []
        self._own: list[SubmissionRecord] = []
        self._tries: Counter[str] = Counter()
        self._resumed: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._finished: defaultdict[str, Counter[bool]] = defaultdict(Counter)
        self._silent_since: float | None = None

    def run(self, calls: Mapping[str, StageCall]) -> Iterator[Done]:
        """Run calls to their end; outcomes come as they are known.

        When the consumer stops early, or is interrupted, jobs go on and are found again; `cancel` ends them.

        Raises:
            ClusterError: if the cluster refuses the jobs.
        """
        self._send(dict(calls), resources_for(self._compute, self._asset))
        interval = self._compute.poll_s
        while self._open:
            self._pause(interval)
            look = self._look()
            changed = look is not None and self._note(look)
            interval = self._compute.poll_s if changed else min(interval * _PATIENCE, self._compute.poll_max_s)
            if look is not None:
                yield from self._judge(look)
        self._ledger.settle(self._settled)
        self._tidy()

    def cancel(self) -> None:
        """Cancel what this run submitted and is not finished; what another run submitted goes on."""
        own = [watch.record for watch in self._open.values() if watch.own]
        self._scheduler.cancel(record.task_id for record in own)
        self._ledger.settle(own)
        if own:
            self._observer.log(logging.WARNING, f"cancelled {len(own)} tasks of {_jobs(own)}")

    # Submission

    def _send(self, calls: dict[str, StageCall], resources: Resources, *, again: bool = False) -> None:
        """Submit what is not on its way, follow the rest."""
        identities = {key: identity(self._asset, key, call) for key, call in calls.items()}
        with self._ledger.locked():
            found = {} if again else self._on_their_way(identities)
            missing = [key for key in calls if key not in found]
            for begin in range(0, len(missing), _TASKS_A_JOB):
                keys = missing[begin : begin + _TASKS_A_JOB]
                record = self._submit({key: calls[key] for key in keys}, identities, resources)
                for index, key in enumerate(keys):
                    self._open[key] = _Watch(TaskRecord(record, index), calls[key], resources, True, self._heard())
            for key, task in self._taken_over(found).items():
                own = task.submission.run_id == self._run_id
                self._open[key] = _Watch(task, calls[key], resources, own, self._heard())

    def _taken_over(self, found: Mapping[str, TaskRecord]) -> dict[str, TaskRecord]:
        """Tasks to follow; those whose own run has ended are this run's from now on."""
        records: dict[str, SubmissionRecord] = {}
        for record in {task.submission.name: task.submission for task in found.values()}.values():
            self._observer.submitted(record, attached=True)
            if record.job is not None and not self._observer.in_progress(record.run_id):
                record = self._ledger.submitted(replace(record, run_id=self._run_id), record.job)  # noqa: PLW2901
                self._own.append(record)
            records[record.name] = record
        return {key: TaskRecord(records[task.submission.name], task.index) for key, task in found.items()}

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
        self._own.append(record)
        self._observer.submitted(record, attached=False)
        return record

    def _on_their_way(self, identities: Mapping[str, str]) -> dict[str, TaskRecord]:
        """Requests whose job is waiting, running or has ended well; the others' entries are given up."""
        found = {key: task for key, sent in identities.items() if (task := self._ledger.find(sent)) is not None}
        known: dict[str, SubmissionRecord | None] = {}
        for task in found.values():
            if task.submission.name not in known:
                known[task.submission.name] = self._with_job(task.submission)
        alive: dict[str, TaskRecord] = {}
        for key, task in found.items():
            record = known[task.submission.name]
            if record is not None:
                alive[key] = TaskRecord(record, task.index)
        if not alive:
            return {}
        look = self._scheduler.look({task.task_id: ("", 0) for task in alive.values()})
        if look.queue_silent or look.accounting_silent:
            # Followed until the scheduler answers: to submit now might be to submit twice.
            return alive
        kept = {key: task for key, task in alive.items() if _worth_following(look, task)}
        self._ledger.settle(task for key, task in alive.items() if key not in kept)
        return kept

    def _with_job(self, record: SubmissionRecord) -> SubmissionRecord | None:
        """A submission with its job id; None when it never took place. The ledger is held: nobody is submitting it."""
        if record.job is not None:
            return record
        while True:
            jobs = self._scheduler.find(record.name)
            if jobs:
                return self._ledger.submitted(record, jobs[0])
            if now() - record.at > _INTENT_S:
                self._ledger.withdraw(record)
                return None
            self._pause(2.0)

    # Following

    def _look(self) -> Look | None:
        tasks = {watch.record.task_id: (watch.messages, watch.offset) for watch in self._open.values()}
        try:
            look = self._scheduler.look(tasks)
        except ClusterUnreachable as error:
            self._silence(str(error))
            return None
        silent = look.queue_silent or look.accounting_silent
        if silent:
            self._silence(silent)
        elif self._silent_since is not None:
            self._observer.log(logging.INFO, "the scheduler answers again")
            self._silent_since = None
        return look

    def _silence(self, cause: str) -> None:
        """Wait for a scheduler that does not answer: jobs go on without it. Not for ever."""
        if self._silent_since is None:
            self._silent_since = time.monotonic()
            self._observer.log(logging.WARNING, f"the scheduler does not answer ({cause}); jobs go on, still asking")
        elif time.monotonic() - self._silent_since > self._compute.accounting_patience_s:
            raise ClusterUnreachable(
                f"the scheduler has not answered for {self._compute.accounting_patience_s:g} s ({cause}); the jobs "
                "were left alone, materialize again to follow them"
            )

    def _note(self, look: Look) -> bool:
        """Take in messages and states; returns whether anything changed."""
        changed = False
        for watch in self._open.values():
            task = watch.record.task_id
            if task in look.lines:
                watch.offset, text = look.lines[task]
                changed = True
                for line in text.splitlines():
                    self._say(watch, line)
            queued = look.queue.get(task)
            watch.state = queued.state if queued else "ENDED"
        counts = Counter(
            f"{row.state.lower()} ({row.reason})" if row.state == "PENDING" else row.state.lower()
            for watch in self._open.values()
            if (row := look.queue.get(watch.record.task_id)) is not None
        )
        if counts != self._counts and not look.queue_silent:
            self._counts = counts
            changed = True
            shown = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
            if shown:
                self._observer.log(logging.INFO, f"{_jobs([w.record for w in self._open.values()])}: {shown}")
        return changed

    def _say(self, watch: _Watch, line: str) -> None:
        try:
            shown = watch.said.take(line)
        except ArtifactError as error:
            self._observer.log(logging.WARNING, f"{watch.record.task_id}: {error}")
            return
        if shown is not None:
            level, text = shown
            key = watch.record.key
            self._observer.log(level, f"[{key}] {text}" if key else text)

    def _judge(self, look: Look) -> Iterator[Done]:
        """Decide about the tasks that have left the queue."""
        again: dict[Resources, dict[str, StageCall]] = {}
        for key, watch in list(self._open.items()):
            task = watch.record.task_id
            if look.queue_silent or task in look.queue:
                watch.absent_since = None
                continue
            accounted = look.accounts.get(task)
            if accounted is not None and accounted.state in TERMINAL:
                ending = ending_of(task, accounted)
            elif look.accounting_silent is None and self._absent_for(watch) > self._compute.vanished_after_s:
                ending = Ending(task, VANISHED)
            else:
                continue
            if task in look.lines and not watch.said.closed:
                continue  # more may be waiting behind what was just read
            verdict = self._verdict(watch, ending)
            if verdict is None:
                continue
            self._settled.append(watch.record)
            del self._open[key]
            self._keep_usage(ending, key, watch.said)
            if isinstance(verdict, Resources):
                again.setdefault(verdict, {})[key] = watch.call
                continue
            if watch.own:
                self._finished[watch.record.submission.name][verdict.report is not None] += 1
            yield verdict if verdict.error is None else replace(verdict, log=watch.log)
        for resources, calls in again.items():
            self._ledger.settle(self._settled)
            self._settled.clear()
            self._send(calls, resources, again=True)

    def _absent_for(self, watch: _Watch) -> float:
        """Seconds since neither queue nor accounting knew a task."""
        watch.absent_since = watch.absent_since or time.monotonic()
        return time.monotonic() - watch.absent_since

    def _verdict(self, watch: _Watch, ending: Ending) -> Done | Resources | None:
        """The outcome of a task that has ended, the resources to send it again with, or None to look again."""
        key, said = watch.record.key, watch.said
        if ending.state == "COMPLETED":
            missing = self._missing(said)
            if missing is None and said.report is not None:
                return Done(key, report=Report.from_json(said.report), ending=ending, usage=said.usage)
            watch.ended_at = watch.ended_at or time.monotonic()
            if time.monotonic() - watch.ended_at < _SETTLE_S:
                return None
            error = JobFailed(f"job {ending.task_id} ended COMPLETED, but {missing}")
        elif said.failure is not None and ending.state == "FAILED":
            return Done(key, error=failure_from(said.failure), ending=ending, usage=said.usage)
        else:
            error = failure_of(ending, watch.resources, self._tail(watch), said.exception)
        again = self._again(watch, ending, error)
        return Done(key, error=error, ending=ending, usage=said.usage) if again is None else again

    def _again(self, watch: _Watch, ending: Ending, error: JobFailed) -> Resources | None:
        """Resources to send a task again with, if that is called for."""
        key = watch.record.key
        if watch.said.interrupted is not None and ending.state == "FAILED":  # torchrun and srun make 1 of its 75
            self._resumed[key] += 1
            if self._resumed[key] <= _RESUMPTIONS:
                self._observer.log(logging.INFO, f"[{key}] saved its pieces and goes on in a new job")
                return watch.resources
        if not watch.own:
            self._observer.log(logging.WARNING, f"[{key}] {error}; it was another run's, so it is sent again")
            return watch.resources
        return self._stronger(key, watch.resources, error)

    def _missing(self, said: Said) -> str | None:
        """What a success lacks, or None."""
        if said.report is None:
            return "its report did not arrive"
        artifact = Path(said.report["artifact"])
        try:
            if read_manifest(artifact) is None:
                return f"{artifact} has no manifest"
            artifact_digest(artifact)
        except SpatialError as error:
            return str(error)
        return None

    def _stronger(self, key: str, resources: Resources, error: JobFailed) -> Resources | None:
        """Resources to try again with, if a retry can help and is allowed."""
        if self._tries[key] >= self._compute.retries:
            return None
        if isinstance(error, JobOutOfMemory):
            stronger = resources.with_more_memory(self._compute.retry_scale)
        elif isinstance(error, JobTimedOut):
            stronger = resources.with_more_time(self._compute.retry_scale)
        else:
            return None
        self._tries[key] += 1
        self._observer.log(
            logging.WARNING, f"[{key}] {error}; trying again with {stronger.mem} and {stronger.time_limit}"
        )
        return stronger

    def _tail(self, watch: _Watch) -> str:
        try:
            return self._scheduler.tails({"log": watch.log}).get("log", "")
        except ClusterError as error:
            return f"(its log could not be read: {error})"

    def _tidy(self) -> None:
        """Remove the folders of submissions all of whose tasks ended well; logs of failures stay."""
        for record in self._own:
            if self._finished[record.name] == Counter({True: len(record.keys)}):
                try:
                    self._scheduler.remove(record.folder, str(self._settings.jobs_dir))
                except ClusterError as error:
                    self._observer.log(logging.WARNING, f"{record.folder} was not removed: {error}")

    def _keep_usage(self, ending: Ending, key: str, said: Said) -> None:
        """Append what a task used to the record of all jobs; a line is written in one piece."""
        prices = (self._compute.cost_per_gpu_hour, self._compute.cost_per_cpu_hour)
        line = json.dumps(usage_record(ending, self._asset, key, said.usage, prices)) + "\n"
        with (self._settings.jobs_dir / "usage.jsonl").open("a") as file:
            file.write(line)


def _worth_following(look: Look, task: TaskRecord) -> bool:
    """Whether a job that was sent earlier still runs, or ended well; else the request has to be sent again."""
    if task.task_id in look.queue:
        return True
    accounted = look.accounts.get(task.task_id)
    return accounted is not None and (accounted.state == "COMPLETED" or accounted.state not in TERMINAL)


def _jobs(records: list[TaskRecord]) -> str:
    jobs = sorted({str(record.submission.job) for record in records}, key=int)
    return f"job {jobs[0]}" if len(jobs) == 1 else f"jobs {', '.join(jobs)}"
