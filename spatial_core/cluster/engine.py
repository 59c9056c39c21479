"""Runs the stage calls of one asset on a cluster, from submission to verified artifacts.

A call is sent once however often it is asked for (`sending`), and what its end means is decided elsewhere (`judging`).
Here tasks are followed: while the scheduler is silent nothing is concluded, and while the queue knows a task it has not
ended.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from spatial_core.cluster.accounting import account_for_given_up, keep_usage
from spatial_core.cluster.ending import TERMINAL, VANISHED, Ending, ending_of, given_up, never_starts
from spatial_core.cluster.following import Done, Observer, Watch
from spatial_core.cluster.judging import Again, Judge
from spatial_core.cluster.ledger import Ledger, TaskRecord
from spatial_core.cluster.resources import Resources, resources_for
from spatial_core.cluster.scheduler import Look, Queued, Scheduler
from spatial_core.cluster.script import Submission, render
from spatial_core.cluster.sending import Sender
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError, ClusterError, ClusterUnreachable, JobFailed, JobTimedOut, NodeFailed
from spatial_core.jobs.messages import Said
from spatial_core.jobs.registry import StageCall

_PATIENCE = 1.3  # factor by which looks grow rarer while nothing happens
_COMPLETE_S = 10.0  # for accounting to learn all there is to know about a job that has ended
_STALLED = 4  # times a job that queues itself again may get no further than before; it may be preempted early
_STUCK_S = 120.0  # a reason for waiting that only people can change has to last that long


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
        clock: seconds that only grow; replaced in tests.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._compute = settings.compute
        self._asset = asset
        self._scheduler = scheduler
        self._observer = observer
        self._heard = heard
        self._pause = pause
        self._clock = clock
        self._ledger = Ledger(settings.jobs_dir)
        self._sender = Sender(
            settings, asset, scheduler, self._ledger, observer,
            python=python, run_id=run_id, job_name=job_name, rendered=rendered, pause=pause,
        )  # fmt: skip
        self._judge = Judge(settings.compute, observer, clock)
        self._open: dict[str, Watch] = {}
        self._settled: list[TaskRecord] = []
        self._ended_well: Counter[str] = Counter()
        self._shown: Counter[str] = Counter()
        self._silent_since: float | None = None

    def run(self, calls: Mapping[str, StageCall]) -> Iterator[Done]:
        """Run calls to their end; outcomes come as they are known.

        When the consumer stops early, or is interrupted, jobs go on and are found again; `cancel` ends them.

        Raises:
            ClusterError: if the cluster refuses all jobs, or does not answer for long.
        """
        for key, refusal in self._send(calls, resources_for(self._compute, self._asset)).items():
            yield Done(key, error=refusal)
        interval = self._compute.poll_s
        while self._open:
            self._pause(interval)
            look = self._look()
            changed = look is not None and self._note(look)
            interval = self._compute.poll_s if changed else min(interval * _PATIENCE, self._compute.poll_max_s)
            if look is not None:
                yield from self._outcomes(look)
        self._ledger.settle(self._settled)
        self._tidy()

    def cancel(self) -> None:
        """Cancel what this run submitted and is not finished; what another run submitted goes on.

        Raises:
            ClusterError: if the scheduler could not do it.
        """
        cancelled = self._sender.cancel()
        if cancelled:
            self._observer.log(logging.WARNING, f"cancelled {cancelled} tasks of {self._asset}")

    def _send(self, calls: Mapping[str, StageCall], resources: Resources) -> dict[str, ClusterError]:
        """Send calls and follow them; returns those that were refused."""
        sent = self._sender.send(calls, resources)
        for key, task in sent.tasks.items():
            own = task.submission.name in self._sender.own
            self._open[key] = Watch(task, calls[key], resources, own, self._heard())
        return sent.refused

    def _look(self) -> Look | None:
        tasks = {watch.record.task_id: (watch.messages, watch.offset) for watch in self._open.values()}
        try:
            look = self._scheduler.look(tasks)
        except ClusterUnreachable as error:
            self._silence(str(error))
            return None
        if look.silent is not None:
            self._silence(look.silent)
        elif self._silent_since is not None:
            self._observer.log(logging.INFO, "the scheduler answers again")
            self._silent_since = None
        return look

    def _silence(self, cause: str) -> None:
        """Wait for a scheduler that does not answer: jobs go on without it. Not for ever."""
        for watch in self._open.values():
            watch.absent_since = watch.stuck_since = None
        if self._silent_since is None:
            self._silent_since = self._clock()
            self._observer.log(logging.WARNING, f"the scheduler does not answer ({cause}); jobs go on, still asking")
        elif self._clock() - self._silent_since > self._compute.accounting_patience_s:
            raise ClusterUnreachable(
                f"the scheduler has not answered for {self._compute.accounting_patience_s:g} s ({cause}); the jobs "
                "were left alone, materialize again to follow them"
            )

    def _note(self, look: Look) -> bool:
        """Take in messages and states; returns whether anything changed."""
        counts: Counter[str] = Counter()
        for watch in self._open.values():
            task = watch.record.task_id
            if task in look.lines:
                watch.offset, text = look.lines[task]
                for line in text.split("\n")[:-1]:
                    self._say(watch, line)
            if (row := look.queue.get(task)) is not None:
                counts[f"{row.state.lower()} ({row.reason})" if row.state == "PENDING" else row.state.lower()] += 1
        moved = counts != self._shown and not look.queue_silent
        if moved:
            self._shown = counts
            shown = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
            if shown:
                jobs = sorted({str(watch.record.submission.job) for watch in self._open.values()}, key=int)
                self._observer.log(logging.INFO, f"{'job' if len(jobs) == 1 else 'jobs'} {', '.join(jobs)}: {shown}")
        return moved or bool(look.lines)

    def _say(self, watch: Watch, line: str) -> None:
        try:
            shown = watch.said.take(line)
        except ArtifactError as error:
            self._observer.log(logging.WARNING, f"{watch.record.task_id}: {error}")
            return
        if shown is not None:
            level, text = shown
            self._observer.log(level, watch.record.label(text))

    def _outcomes(self, look: Look) -> Iterator[Done]:
        """What has been decided by now."""
        ended = self._ended(look)
        logs = self._logs([watch for watch, ending in ended if self._judge.needs_log(watch, ending)])
        again: defaultdict[Resources, dict[str, Again]] = defaultdict(dict)
        for watch, ending in ended:
            key = watch.record.key
            verdict = self._judge.verdict(watch, ending, logs.get(key, ""))
            if verdict is None:
                continue
            if watch.own:  # else the run whose job it is does it
                keep_usage(self._settings, watch.record, ending, watch.said.usage)
            if isinstance(verdict, Again):
                again[verdict.resources][key] = verdict
                continue
            self._close(watch, well=verdict.report is not None)
            yield verdict
        for watch, error in self._stuck(look):
            key = watch.record.key
            done = Done(key, error=error, log=watch.log)
            self._ledger.give_up([watch.record])
            if isinstance(error, NodeFailed) and self._judge.once_more(watch, error):
                again[watch.resources][key] = Again(watch.resources, error, done)
                continue
            self._close(watch, well=False)
            yield done
        for resources, verdicts in again.items():
            yield from self._send_again(verdicts, resources)

    def _ended(self, look: Look) -> list[tuple[Watch, Ending]]:
        """Tasks that have left the queue and of whose end everything has been read."""
        ended = []
        for watch in self._open.values():
            task = watch.record.task_id
            if look.queue_silent or task in look.queue:
                watch.absent_since = None
                continue
            accounted = look.accounts.get(task)
            if accounted is not None and accounted.state in TERMINAL:
                if not accounted.complete and self._absent_for(watch) < _COMPLETE_S:
                    continue
                ending = ending_of(task, accounted).with_reported(watch.said.usage)
            elif self._absent_for(watch) > self._compute.vanished_after_s:
                ending = Ending(task, VANISHED)
            else:
                continue
            if task not in look.more:
                ended.append((watch, ending))
        return ended

    def _absent_for(self, watch: Watch) -> float:
        """Seconds since the queue knew a task, or accounting its end, both answering all the time."""
        watch.absent_since = self._clock() if watch.absent_since is None else watch.absent_since
        return self._clock() - watch.absent_since

    def _stuck(self, look: Look) -> list[tuple[Watch, JobFailed]]:
        """Tasks of this run that wait for what will not happen, cancelled, each with why."""
        rows = ((watch, look.queue.get(watch.record.task_id)) for watch in self._open.values() if watch.own)
        found = ((watch, self._hopeless(watch, row)) for watch, row in rows if row is not None)
        stuck = [(watch, error) for watch, error in found if error is not None]
        try:
            self._scheduler.cancel(watch.record.task_id for watch, _ in stuck)
        except ClusterError as error:
            self._silence(str(error))
            return []
        return stuck

    def _hopeless(self, watch: Watch, row: Queued) -> JobFailed | None:
        """Why a task in the queue is not worth waiting for, or None."""
        task, since = f"job {watch.record.task_id}", watch.stuck_since
        waits = never_starts(row.state, row.reason)
        watch.stuck_since = (self._clock() if since is None else since) if waits else None
        if given_up(row.state, row.reason):
            return NodeFailed(f"{task} could not be started ({row.reason}) and was cancelled")
        if watch.said.stalled >= _STALLED:
            reached = (watch.said.reached or {}).get("message", "")
            return JobTimedOut(
                f"{task} was told to stop {_STALLED + 1} times at the same place and was cancelled ({reached}); ask "
                f"for more time than {watch.resources.time_limit} (compute.resources.{self._asset}.time_limit)"
            )
        if watch.stuck_since is not None and self._clock() - watch.stuck_since > _STUCK_S:
            asked = " ".join(watch.resources.options())
            return JobFailed(
                f"{task} could never start ({row.reason}) and was cancelled; it had asked for {asked}: change "
                f"compute.resources.{self._asset} to what the partition allows"
            )
        return None

    def _logs(self, watches: list[Watch]) -> dict[str, str]:
        """Partition key -> last bytes of its log."""
        if not watches:
            return {}
        try:
            return self._scheduler.tails({watch.record.key: watch.log for watch in watches})
        except ClusterError as error:
            return dict.fromkeys((watch.record.key for watch in watches), f"(the log could not be read: {error})")

    def _send_again(self, verdicts: Mapping[str, Again], resources: Resources) -> Iterator[Done]:
        calls = {key: self._open[key].call for key in verdicts}
        for key in verdicts:
            self._close(self._open[key], well=self._open[key].said.interrupted is not None)
        self._ledger.settle(self._settled)
        self._settled.clear()
        try:
            refused = self._send(calls, resources)
        except ClusterError as refusal:
            refused = dict.fromkeys(calls, refusal)
        for key, cause in refused.items():
            again = verdicts[key]
            text = f"{again.error}; it could not be sent again: {cause}"
            yield replace(again.otherwise, error=type(again.error)(text))

    def _close(self, watch: Watch, *, well: bool) -> None:
        """Follow a task no longer."""
        del self._open[watch.record.key]
        self._settled.append(watch.record)
        self._ended_well[watch.record.submission.name] += well

    def _tidy(self) -> None:
        """Account for what was given up; let the folders of submissions go that ended well. Logs of failures stay."""
        try:
            account_for_given_up(self._settings, self._scheduler)
        except ClusterError as error:
            self._observer.log(logging.WARNING, f"what cancelled jobs used is not known yet: {error}")
        for name, record in self._sender.own.items():
            if self._ended_well[name] == len(record.keys):
                self._ledger.retire(record)
        for record in self._ledger.retired():
            try:
                self._scheduler.remove(record.folder, str(self._settings.jobs_dir))
            except ClusterError as error:
                self._observer.log(logging.WARNING, f"{record.folder} was not removed: {error}")
            else:
                self._ledger.forget(record)
