"""The scheduler as seen from here: submit, look, cancel. Nothing is concluded from silence."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spatial_core.cluster.beside_scheduler import expand
from spatial_core.cluster.script import Submission
from spatial_core.cluster.transport import NotConnected, Transport
from spatial_core.errors import ClusterError, ClusterUnreachable

_NOT_NOW = ("Unable to contact slurm controller", "Slurm backup controller")
_RETRY_S = 5.0
_FIND_S = 20.0  # accounting lags behind by less than a second; a slow controller by its message timeout


class UnclearSubmission(ClusterUnreachable):
    """It is not known whether the cluster took a submission; it has to be looked for by its name."""


@dataclass(frozen=True)
class Queued:
    """What the queue says of a task: state, reason for waiting, nodes."""

    state: str
    reason: str
    nodes: str


@dataclass(frozen=True)
class Accounted:
    """What accounting says of a task's last attempt.

    Args:
        job: its row.
        steps: rows of its steps, where processes are counted.
        earlier: attempts before it, which ended in a requeue; oldest first.
    """

    job: Mapping[str, str]
    steps: tuple[Mapping[str, str], ...] = ()
    earlier: tuple[Accounted, ...] = ()

    @property
    def state(self) -> str:
        """First word: "CANCELLED by 0" is CANCELLED."""
        return self.job["State"].partition(" ")[0]

    @property
    def complete(self) -> bool:
        """Whether accounting knows what the job had asked for; of a short job it learns that after its end."""
        return bool(self.job["Partition"])


@dataclass
class Look:
    """One look at the cluster.

    Args:
        queue: task id -> row, of everything that is waiting or running.
        accounts: task id -> rows, of tasks that are not in the queue.
        lines: task id -> (new offset, whole lines).
        more: tasks that have said more than that.
        queue_silent, accounting_silent: why one of them gave no answer.
    """

    queue: dict[str, Queued] = field(default_factory=dict)
    accounts: dict[str, Accounted] = field(default_factory=dict)
    lines: dict[str, tuple[int, str]] = field(default_factory=dict)
    more: frozenset[str] = frozenset()
    queue_silent: str | None = None
    accounting_silent: str | None = None

    @property
    def silent(self) -> str | None:
        """Why nothing is to be concluded from what is missing."""
        return self.queue_silent or self.accounting_silent


@dataclass(frozen=True)
class Ran:
    """How a command ended beside the scheduler: exit code (127: not there, 124: no answer) and what it printed."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Its own words about a failure, one line."""
        return " ".join((self.err or self.out).split()) or f"exit code {self.code}"


class Scheduler:
    """A cluster's scheduler.

    Args:
        transport: the way to it.
        warn: told when it does not answer.
        patience_s: seconds to wait for a cluster that cannot be reached before a submission fails.
        pause: waits; replaced in tests.
        clock: seconds that only grow; replaced in tests.
    """

    def __init__(
        self,
        transport: Transport,
        warn: Callable[[str], None],
        patience_s: float,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._warn = warn
        self._patience_s = patience_s
        self._pause = pause
        self._clock = clock

    def submit(self, submission: Submission) -> str:
        """Hand over a submission; waits for a cluster that is away.

        Returns:
            The job id.

        Raises:
            UnclearSubmission: if it may have been taken but could not be found.
            ClusterError: if it was refused; the message is sbatch's.
        """
        deadline = self._clock() + self._patience_s
        warned = False
        while True:
            try:
                answer = self._transport.ask(submission.request())
            except NotConnected as error:
                if self._clock() > deadline:
                    raise
                cause = str(error)
            except ClusterUnreachable as error:
                return self._found(submission.name, str(error))
            else:
                if "job" in answer:
                    return str(answer["job"])
                cause = _line(answer["error"]) or ""
                if answer["unclear"]:
                    return self._found(submission.name, cause)
                if not any(text in cause for text in _NOT_NOW) or self._clock() > deadline:
                    raise ClusterError(f"the job was refused: {cause.replace('sbatch: error: ', '')}")
            if not warned:
                self._warn(f"the scheduler does not take jobs now ({cause}); trying again every {_RETRY_S:g} s")
                warned = True
            self._pause(_RETRY_S)

    def _found(self, name: str, cause: str) -> str:
        """The id of a job that may have been taken; a scheduler that is away is waited for."""
        self._warn(f"it is not known whether the job was taken ({cause}); looking for it")
        given_up = self._clock() + self._patience_s
        answered_since: float | None = None
        while True:
            try:
                jobs = self.find(name)
            except ClusterError:
                answered_since = None
            else:
                if jobs:
                    return jobs[0]
                answered_since = self._clock() if answered_since is None else answered_since
            now = self._clock()
            if now > given_up or (answered_since is not None and now - answered_since > _FIND_S):
                raise UnclearSubmission(
                    f"{cause}; it is not known whether job {name} was taken, materialize again to have it looked for"
                )
            self._pause(2.0)

    def find(self, name: str) -> list[str]:
        """Job ids of a job name.

        Raises:
            ClusterError: if queue or accounting does not answer.
        """
        answer = self._transport.ask({"do": "find", "name": name})
        if "error" in answer:
            raise ClusterError(f"cannot look for job {name}: {_line(answer['error'])}")
        return list(answer["jobs"])

    def look(self, tasks: Mapping[str, tuple[str | None, int]]) -> Look:
        """The state of tasks and their new messages.

        Args:
            tasks: task id -> (folder of its message file, bytes of it that were read); no folder, no messages.

        Raises:
            ClusterUnreachable: if the cluster could not be asked.
        """
        jobs: dict[str, dict[str, Any]] = {}
        for name, (messages, offset) in tasks.items():
            job = jobs.setdefault(name.partition("_")[0], {"messages": messages, "tasks": {}})
            job["tasks"][name] = offset
        answer = self._transport.ask({"do": "poll", "jobs": jobs})
        look = Look(
            queue_silent=_line(answer.get("queue_error")), accounting_silent=_line(answer.get("accounting_error"))
        )
        for row in answer["queue"]:
            queued = Queued(*row[1:4])
            look.queue.update((name, queued) for name in expand(row[0]) if name in tasks)
        look.accounts = _accounts(answer["accounting"])
        look.lines = {name: (offset, text) for name, (offset, text) in answer["messages"].items()}
        look.more = frozenset(answer["more"])
        return look

    def cancel(self, names: Iterable[str]) -> None:
        """Cancel jobs or tasks.

        Raises:
            ClusterError: if scancel could not do it.
        """
        wanted = sorted(set(names))
        if wanted and "error" in (answer := self._transport.ask({"do": "cancel", "jobs": wanted})):
            raise ClusterError(f"scancel {' '.join(wanted[:3])}{' …' * (len(wanted) > 3)}: {_line(answer['error'])}")

    def tails(self, files: Mapping[str, str], size: int = 2000) -> dict[str, str]:
        """The last bytes of files beside the scheduler, of those that exist."""
        return dict(self._transport.ask({"do": "tail", "files": dict(files), "bytes": size})["tails"])

    def run(self, *argv: str, text: str | None = None) -> Ran:
        """Run one command of less than a minute beside the scheduler.

        Args:
            argv: the command.
            text: for its standard input.
        """
        answer = self._transport.ask({"do": "run", "argv": list(argv), "text": text})
        return Ran(answer["code"], answer["out"], answer["err"])

    def remove(self, folder: str, inside: str) -> None:
        """Delete a job folder.

        Raises:
            ClusterError: if it is not one.
        """
        if "error" in (answer := self._transport.ask({"do": "remove", "folder": folder, "inside": inside})):
            raise ClusterError(str(answer["error"]))


def _line(said: str | None) -> str | None:
    """What a command said, in one line."""
    return None if said is None else " ".join(said.split())


def _accounts(rows: Iterable[Mapping[str, str]]) -> dict[str, Accounted]:
    """Rows by task id. Each row of a job is an attempt, followed by those of its steps."""
    attempts: defaultdict[str, list[tuple[Mapping[str, str], list[Mapping[str, str]]]]] = defaultdict(list)
    for row in rows:
        name, dot, _ = row["JobID"].partition(".")
        if not dot:
            for task in expand(name):
                attempts[task].append((row, []))
        elif name in attempts:
            attempts[name][-1][1].append(row)
    return {task: _last(listed) for task, listed in attempts.items()}


def _last(attempts: list[tuple[Mapping[str, str], list[Mapping[str, str]]]]) -> Accounted:
    """The last attempt of a task, with those before it: of another name is what had its number before a reset."""
    *earlier, (job, steps) = sorted(attempts, key=lambda attempt: attempt[0]["Submit"])
    before = (Accounted(row, tuple(its)) for row, its in earlier if row["JobName"] == job["JobName"])
    return Accounted(job, tuple(steps), tuple(before))
