"""What the end of a task means for its call: an outcome, another try, or that it is too early to say.

A call has succeeded when accounting says COMPLETED *and* the stage's report has arrived *and* the artifact lies in
place with the digest of its manifest; nothing less counts. Another try is made for a job that saved its pieces when it
was told to stop, for another run's job that failed, and, if the settings allow it, for one that ran out of memory or
time.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spatial_core.cluster.ending import Ending, failure_of
from spatial_core.cluster.following import Done, Observer, Watch
from spatial_core.cluster.resources import Resources
from spatial_core.config.compute import ComputeSection
from spatial_core.errors import JobFailed, JobOutOfMemory, JobTimedOut, SpatialError
from spatial_core.jobs.messages import Said
from spatial_core.jobs.pipes import failure_from
from spatial_core.report import Report
from spatial_core.storage.provenance import artifact_digest, read_manifest

_SETTLE_S = 60.0  # for reports and artifacts to be seen through a network file system after the job has ended
_RESUMPTIONS = 50  # of a job that saved its pieces; each has got further than the one before
# Ends of a job that saved its pieces: by its own exit code, of which srun and torchrun make 1, or cut short on its way
# out. One that was cancelled stays cancelled.
_GOES_ON = frozenset({"FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL"})


@dataclass(frozen=True)
class Again:
    """A call is to be sent again.

    Args:
        resources: to ask for.
        error: what ended the job.
        otherwise: the outcome if it cannot be sent again.
    """

    resources: Resources
    error: JobFailed
    otherwise: Done


class Judge:
    """Judges the tasks of one run.

    Args:
        compute: settings.
        observer: told of every further try.
        clock: seconds that only grow; replaced in tests.
    """

    def __init__(self, compute: ComputeSection, observer: Observer, clock: Callable[[], float]) -> None:
        self._compute = compute
        self._observer = observer
        self._clock = clock
        self._retries: Counter[str] = Counter()
        self._resumptions: Counter[str] = Counter()
        self._saved: dict[str, dict[str, Any]] = {}
        self._sent_again: set[str] = set()  # once, for what was not the call's own fault

    def needs_log(self, watch: Watch, ending: Ending) -> bool:
        """Whether the last lines of its log belong into the outcome."""
        return ending.state != "COMPLETED" and not _expected_failure(watch, ending)

    def verdict(self, watch: Watch, ending: Ending, log: str) -> Done | Again | None:
        """The outcome of a task that has ended, another try, or None to look again.

        Args:
            watch: the task.
            ending: how it ended.
            log: last bytes of its output.
        """
        key, said = watch.record.key, watch.said
        if ending.state == "COMPLETED":
            missing = _missing(said)
            if missing is None and said.report is not None:
                return Done(key, report=Report.from_json(said.report), ending=ending, usage=said.usage)
            watch.ended_at = self._clock() if watch.ended_at is None else watch.ended_at
            if self._clock() - watch.ended_at < _SETTLE_S:
                return None
            error = JobFailed(f"job {ending.task_id} ended COMPLETED, but {missing}")
        elif said.failure is not None and _expected_failure(watch, ending):
            return Done(key, error=failure_from(said.failure), ending=ending, usage=said.usage, log=watch.log)
        else:
            error = failure_of(ending, watch.record.submission.asset, watch.resources, log, said)
        done = Done(key, error=error, ending=ending, usage=said.usage, log=watch.log)
        resources = self._again(watch, ending, error)
        return done if resources is None else Again(resources, error, done)

    def once_more(self, watch: Watch, error: JobFailed) -> bool:
        """Whether a call is sent again that failed through no fault of its own or of this run; it is, once."""
        key = watch.record.key
        if key in self._sent_again:
            return False
        self._sent_again.add(key)
        whose = "" if watch.own else "it was another run's, "
        self._observer.log(logging.WARNING, watch.record.label(f"{error}; {whose}so it is sent again"))
        return True

    def _again(self, watch: Watch, ending: Ending, error: JobFailed) -> Resources | None:
        """Resources to send a call again with, if that is called for."""
        key, saved = watch.record.key, watch.said.interrupted
        if saved is not None and ending.state in _GOES_ON:
            further = saved != self._saved.get(key)
            self._saved[key] = saved
            self._resumptions[key] += 1
            if further and self._resumptions[key] <= _RESUMPTIONS:
                self._observer.log(logging.INFO, watch.record.label("saved its pieces and goes on in a new job"))
                return watch.resources
        if not watch.own and self.once_more(watch, error):
            return watch.resources
        # More time is no help against a deadline.
        return None if ending.state == "DEADLINE" else self._stronger(watch, error)

    def _stronger(self, watch: Watch, error: JobFailed) -> Resources | None:
        """Resources to try again with, if a retry can help and is allowed."""
        key, resources = watch.record.key, watch.resources
        if self._retries[key] >= self._compute.retries:
            return None
        if isinstance(error, JobOutOfMemory):
            stronger = resources.with_more_memory(self._compute.retry_scale)
        elif isinstance(error, JobTimedOut):
            stronger = resources.with_more_time(self._compute.retry_scale)
        else:
            return None
        self._retries[key] += 1
        again = f"{error}; trying again with {stronger.mem} and {stronger.time_limit}"
        self._observer.log(logging.WARNING, watch.record.label(again))
        return stronger


def _expected_failure(watch: Watch, ending: Ending) -> bool:
    return watch.said.failure is not None and ending.state == "FAILED"


def _missing(said: Said) -> str | None:
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
