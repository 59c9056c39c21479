"""What was sent to the cluster and not yet taken note of: by it, a request is never sent twice and no job is forgotten.

A folder on the shared file system. `tasks/<identity>.json` names the submission a request is part of and its place in
it; `submissions/<name>.json` holds the job id, once sbatch has given one, and the Dagster run that asked. Both are
written before sbatch is called, so that after a crash at any point a submission is found, if need be by its name.
Entries are removed when a run has taken note of the outcome.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from spatial_core.errors import ArtifactError
from spatial_core.storage.atomic import write_json


@dataclass(frozen=True)
class SubmissionRecord:
    """One sbatch call.

    Args:
        name: job name.
        asset: asset of all its tasks.
        folder: job folder.
        run_id: Dagster run that asked.
        keys: partition keys, in the order of the tasks.
        identities: of the requests, in the same order.
        at: when, seconds since the epoch.
        job: job id; None while it is not known whether sbatch took it.
    """

    name: str
    asset: str
    folder: str
    run_id: str
    keys: tuple[str, ...]
    identities: tuple[str, ...]
    at: float
    job: str | None = None


@dataclass(frozen=True)
class TaskRecord:
    """One request that is on the cluster: its submission and place in it."""

    submission: SubmissionRecord
    index: int

    @property
    def key(self) -> str:
        return self.submission.keys[self.index]

    @property
    def task_id(self) -> str:
        """As the scheduler names it: a task of an array by its place, a plain job by its number alone."""
        array = len(self.submission.keys) > 1
        return f"{self.submission.job}_{self.index}" if array else str(self.submission.job)


class Ledger:
    """The records in a folder of jobs."""

    def __init__(self, jobs_dir: Path) -> None:
        self._folder = jobs_dir / "ledger"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the ledger while looking up and submitting; others wait. A process that dies holds nothing."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / ".lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def find(self, identity: str) -> TaskRecord | None:
        """The submission a request is part of, if it was sent and not yet taken note of."""
        entry = _read(self._task_file(identity))
        submission = None if entry is None else self.submission(entry["name"])
        if submission is None or identity not in submission.identities:
            return None
        return TaskRecord(submission, submission.identities.index(identity))

    def submission(self, name: str) -> SubmissionRecord | None:
        """A submission by its name."""
        record = _read(self._submission_file(name))
        if record is None:
            return None
        return SubmissionRecord(**{**record, "keys": tuple(record["keys"]), "identities": tuple(record["identities"])})

    def submissions(self) -> list[SubmissionRecord]:
        """All that are not settled, oldest first."""
        names = [path.stem for path in (self._folder / "submissions").glob("[!.]*.json")]
        found = [record for name in names if (record := self.submission(name)) is not None]
        return sorted(found, key=lambda record: record.at)

    def outstanding(self, submission: SubmissionRecord) -> list[TaskRecord]:
        """Its tasks that nobody has taken note of."""
        tasks = [TaskRecord(submission, index) for index in range(len(submission.keys))]
        return [task for task in tasks if self._belongs(task)]

    def intend(self, submission: SubmissionRecord) -> None:
        """Record a submission that is about to be made."""
        write_json(self._submission_file(submission.name), asdict(submission))
        for identity in submission.identities:
            path = self._task_file(identity)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without flushing to disk: the submission, which is flushed, can be found without it.
            temporary = path.with_name(f".{path.name}.partial")
            temporary.write_text(json.dumps({"name": submission.name}))
            temporary.replace(path)

    def submitted(self, submission: SubmissionRecord, job: str) -> SubmissionRecord:
        """Record the job id."""
        known = replace(submission, job=job)
        write_json(self._submission_file(submission.name), asdict(known))
        return known

    def withdraw(self, submission: SubmissionRecord) -> None:
        """Forget a submission that did not take place."""
        self.settle(TaskRecord(submission, index) for index in range(len(submission.keys)))

    def settle(self, tasks: Iterable[TaskRecord]) -> None:
        """Outcomes were taken note of (or given up on purpose); a submission without open tasks is forgotten."""
        touched: dict[str, SubmissionRecord] = {}
        for task in tasks:
            touched[task.submission.name] = task.submission
            if self._belongs(task):
                self._task_file(task.submission.identities[task.index]).unlink(missing_ok=True)
        for submission in touched.values():
            if not self.outstanding(submission):
                self._submission_file(submission.name).unlink(missing_ok=True)

    def _belongs(self, task: TaskRecord) -> bool:
        """Whether the request's entry still points to this submission, not to a later one."""
        entry = _read(self._task_file(task.submission.identities[task.index]))
        return entry is not None and entry["name"] == task.submission.name

    def _task_file(self, identity: str) -> Path:
        return self._folder / "tasks" / f"{identity}.json"

    def _submission_file(self, name: str) -> Path:
        return self._folder / "submissions" / f"{name}.json"


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}); see `squeue --me` before deleting it") from error
    return record


def now() -> float:
    """Seconds since the epoch: records outlive processes, so a monotonic clock would not do."""
    return time.time()
