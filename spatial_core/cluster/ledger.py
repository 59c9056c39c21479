"""What was sent to the cluster and not yet taken note of: by it, a request is never sent twice and no job is forgotten.

A folder on the shared file system with one file a submission: the requests it is made of, the Dagster run that asked,
the job id once sbatch has given one, and which tasks are settled. It is written before sbatch is called, so that after
a crash at any point a submission is found, if need be by its name. A task is settled when a run has taken note of its
outcome, or has given it up on purpose; a submission without open tasks is forgotten. What was given up is kept apart
until accounting has told what it used.

Two locks: `sending` is held from looking a request up until it is submitted, which may take as long as the scheduler is
away; the other one is held for the moment in which a file changes, so that nobody who only takes note has to wait.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from spatial_core.errors import ArtifactError
from spatial_core.storage.atomic import write_json

KEPT_S = 900.0  # a job folder after its end: another run that follows the job reads its messages a while later


@dataclass(frozen=True)
class SubmissionRecord:
    """One sbatch call.

    Args:
        name: job name.
        asset: asset of all its tasks.
        folder: job folder.
        run_id: Dagster run that asked, or that has taken it over.
        keys: partition keys, in the order of the tasks.
        identities: of the requests, in the same order.
        at: when, seconds since the epoch.
        job: job id; None while it is not known whether sbatch took it.
        settled: places of the tasks that nobody needs to look at any more.
        destinations: where the requests leave what they make, in the same order.
    """

    name: str
    asset: str
    folder: str
    run_id: str
    keys: tuple[str, ...]
    identities: tuple[str, ...]
    at: float
    job: str | None = None
    settled: tuple[int, ...] = ()
    destinations: tuple[str, ...] = ()

    @property
    def open_tasks(self) -> list[TaskRecord]:
        """Its tasks that are not settled."""
        settled = set(self.settled)
        return [TaskRecord(self, index) for index in range(len(self.keys)) if index not in settled]


@dataclass(frozen=True)
class TaskRecord:
    """One request that is on the cluster: its submission and place in it."""

    submission: SubmissionRecord
    index: int

    def label(self, text: str) -> str:
        """A line about it: begins with its partition key, if it has one."""
        return f"[{self.key}] {text}" if self.key else text

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
    def sending(self) -> Iterator[None]:
        """Hold the ledger while looking up and submitting; others wait. A process that dies holds nothing."""
        with self._locked("sending.lock"):
            yield

    def find(self, identities: Mapping[str, str]) -> dict[str, TaskRecord]:
        """Requests that were sent and are not settled, each in its latest submission.

        Args:
            identities: partition key -> identity of the request.
        """
        sent = {
            task.submission.identities[task.index]: task
            for submission in self.submissions()
            for task in submission.open_tasks
        }
        return {key: sent[identity] for key, identity in identities.items() if identity in sent}

    def outdated(self, asset: str, identities: Mapping[str, str], destinations: Mapping[str, str]) -> list[TaskRecord]:
        """Open tasks of an asset that make the same artifacts from inputs or settings of another time.

        Args:
            asset: its name.
            identities, destinations: partition key -> identity and destination of the request of now.
        """
        return [
            task
            for submission in self.submissions()
            if submission.asset == asset
            for task in submission.open_tasks
            if identities.get(task.key) not in {None, submission.identities[task.index]}
            and destinations[task.key] == submission.destinations[task.index]
        ]

    def submissions(self) -> list[SubmissionRecord]:
        """All that are not settled, oldest first."""
        return self._records("")

    def submission(self, name: str) -> SubmissionRecord | None:
        """A submission by its name; None once it is settled.

        Raises:
            ArtifactError: if its file is damaged.
        """
        path = self._file(name)
        try:
            record = json.loads(path.read_text())
            texts = {field: tuple(record[field]) for field in ("keys", "identities", "settled", "destinations")}
            return SubmissionRecord(**{**record, **texts})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path}: not the record of a submission ({error}); see `squeue --me --name {name}` before deleting it"
            ) from error

    def intend(self, submission: SubmissionRecord) -> None:
        """Record a submission that is about to be made."""
        with self._locked("change.lock"):
            write_json(self._file(submission.name), asdict(submission))

    def submitted(self, submission: SubmissionRecord, job: str) -> SubmissionRecord:
        """Record the job id; a job that exists is recorded even if its submission was settled meanwhile."""
        return self._change(submission, lambda record: replace(record, job=job))

    def adopt(self, submission: SubmissionRecord, run_id: str) -> SubmissionRecord:
        """Record that another run looks after it from now on."""
        return self._change(submission, lambda record: replace(record, run_id=run_id))

    def withdraw(self, submission: SubmissionRecord) -> None:
        """Forget a submission that did not take place."""
        self.settle(submission.open_tasks)

    def settle(self, tasks: Iterable[TaskRecord]) -> None:
        """Outcomes were taken note of."""
        self._settle("", tasks)

    def give_up(self, tasks: Iterable[TaskRecord]) -> None:
        """Settle tasks whose outcome nobody waits for; what they used is still to be accounted for."""
        given_up = list(tasks)
        for submission, places in _places(given_up):
            with self._locked("change.lock"):
                owed = self.submission(f"unaccounted/{submission.name}")
                settled = set(range(len(submission.keys))) if owed is None else set(owed.settled)
                record = replace(submission, at=now(), settled=tuple(sorted(settled - places)))
                write_json(self._file(f"unaccounted/{submission.name}"), asdict(record))
        self.settle(given_up)

    def unaccounted(self) -> list[SubmissionRecord]:
        """Submissions of tasks that were given up, these tasks open."""
        return self._records("unaccounted/")

    def accounted(self, tasks: Iterable[TaskRecord]) -> None:
        """It was written down what tasks that were given up have used."""
        self._settle("unaccounted/", tasks)

    def retire(self, submission: SubmissionRecord) -> None:
        """Record that a job folder can go."""
        write_json(self._file(f"retired/{submission.name}"), asdict(replace(submission, at=now())))

    def retired(self) -> list[SubmissionRecord]:
        """Submissions whose job folder can go now."""
        return [record for record in self._records("retired/") if now() - record.at > KEPT_S]

    def forget(self, submission: SubmissionRecord) -> None:
        """A job folder is gone."""
        self._file(f"retired/{submission.name}").unlink(missing_ok=True)

    def _change(
        self, submission: SubmissionRecord, change: Callable[[SubmissionRecord], SubmissionRecord]
    ) -> SubmissionRecord:
        """Change what is recorded now, which may be more than what the caller has read."""
        with self._locked("change.lock"):
            changed = change(self.submission(submission.name) or submission)
            write_json(self._file(changed.name), asdict(changed))
        return changed

    def _records(self, place: str) -> list[SubmissionRecord]:
        """Those in a folder of the ledger, oldest first."""
        names = [f"{place}{path.stem}" for path in (self._folder / place).glob("[!.]*.json")]
        found = [record for name in names if (record := self.submission(name)) is not None]
        return sorted(found, key=lambda record: record.at)

    def _settle(self, place: str, tasks: Iterable[TaskRecord]) -> None:
        for submission, settled in _places(tasks):
            name = f"{place}{submission.name}"
            with self._locked("change.lock"):
                record = self.submission(name)
                if record is None:
                    continue
                record = replace(record, settled=tuple(sorted({*record.settled, *settled})))
                if record.open_tasks:
                    write_json(self._file(name), asdict(record))
                else:
                    self._file(name).unlink()

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f".{name}").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def _places(tasks: Iterable[TaskRecord]) -> list[tuple[SubmissionRecord, set[int]]]:
    """Tasks by submission."""
    submissions: dict[str, SubmissionRecord] = {}
    places: defaultdict[str, set[int]] = defaultdict(set)
    for task in tasks:
        submissions[task.submission.name] = task.submission
        places[task.submission.name].add(task.index)
    return [(submission, places[name]) for name, submission in submissions.items()]


def now() -> float:
    """Seconds since the epoch: records outlive processes, so a monotonic clock would not do."""
    return time.time()
