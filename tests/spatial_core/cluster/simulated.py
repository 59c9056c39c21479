"""A cluster that is a Python object, with a clock that only waiting moves: what takes a real one minutes, or never is.

It stands where `beside_scheduler` would answer. A test prepares one step a look (`step`), or changes tasks while it
takes outcomes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from spatial_core.cluster.engine import Engine
from spatial_core.cluster.following import Done
from spatial_core.cluster.ledger import SubmissionRecord
from spatial_core.cluster.scheduler import Scheduler
from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterUnreachable
from spatial_core.jobs.registry import StageCall
from spatial_core.jobs.task import Task
from spatial_core.report import Report
from spatial_core.storage.provenance import Provenance, record_artifact

MAX_LOOKS = 5000


@dataclass
class Simulated:
    """A task of a job.

    Args:
        key: partition key.
        state: in the queue; empty when it has left it.
        account: row of accounting; None while accounting has not heard of it.
        said: content of its message file.
        more: the answer to a look was full before its messages.
    """

    key: str
    state: str = "PENDING"
    reason: str = "Priority"
    account: dict[str, str] | None = None
    said: str = ""
    more: bool = False
    log: str = ""

    def say(self, method: str, **params: Any) -> None:
        """Write a message."""
        self.said += json.dumps({"method": method, "params": params}) + "\n"

    def start(self) -> None:
        """Begin an attempt."""
        self.state, self.reason = "RUNNING", "None"
        self.say("opened")

    def tell(self, **payload: Any) -> None:
        """Report something and close the session."""
        self.say("report_custom_message", payload=payload)
        self.say("closed")

    def end(self, state: str, exit_code: str = "0:0", **columns: str) -> None:
        """Leave the queue with a row in accounting."""
        self.state = ""
        self.account = {"State": state, "ExitCode": exit_code, **columns}


@dataclass
class Job:
    """A submission that was taken."""

    name: str
    options: list[str]
    tasks: list[Simulated]

    def option(self, name: str) -> str:
        """Value of an sbatch option."""
        return next(text.partition("=")[2] for text in self.options if text.startswith(f"--{name}="))


COLUMNS = {
    "ElapsedRaw": "9", "TotalCPU": "00:08.000", "CPUTimeRAW": "9", "MaxRSS": "", "NodeList": "node1",
    "AllocTRES": "cpu=1,mem=4G,node=1", "ReqMem": "4G", "Submit": "s", "Start": "b", "End": "e",
    "Partition": "cpu", "JobName": "n",
}  # fmt: skip


class SimulatedCluster:
    """Answers the requests of `Scheduler`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.jobs: dict[str, Job] = {}
        self.asked: list[Mapping[str, Any]] = []
        self.cancelled: list[str] = []
        self.removed: list[str] = []
        self.refusal: str | None = None
        self.lose_answer = False
        self.queue_error: str | None = None
        self.accounting_error: str | None = None
        self.unreachable = False
        self._steps: list[Callable[[], None]] = []

    def step(self, *actions: Callable[[], None]) -> None:
        """What happens before the looks to come are answered, one action each."""
        self._steps += actions

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        assert len(self.pauses) < MAX_LOOKS, f"still waiting; tasks: {[job.tasks for job in self.jobs.values()]}"

    def clock(self) -> float:
        return self.now

    def task(self, key: str, job: int = -1) -> Simulated:
        """The task of a partition key, in its latest job or the one with a number."""
        return [task for job in self.jobs.values() for task in job.tasks if task.key == key][job]

    def did(self, what: str) -> int:
        """How often something was asked."""
        return sum(request["do"] == what for request in self.asked)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(request)
        # Looking up what is on its way, which asks for no messages, is no look of somebody who follows.
        follows = request["do"] == "poll" and all(job["messages"] for job in request["jobs"].values())
        if follows and self._steps:
            self._steps.pop(0)()
        if self.unreachable:
            raise ClusterUnreachable("no route to host")
        answer: dict[str, Any] = getattr(self, f"_{request['do']}")(request)
        return answer

    def _submit(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self.refusal is not None:
            return {"error": f"sbatch: error: {self.refusal}", "unclear": False}
        number = str(100 + len(self.jobs))
        files = [name for name in request["files"] if name.startswith("tasks/")]
        name = next(text for text in request["options"] if text.startswith("--job-name=")).partition("=")[2]
        tasks = [Simulated(_key(request["files"][f"tasks/{index}.json"])) for index in range(len(files))]
        self.jobs[number] = Job(name, request["options"], tasks)
        if self.lose_answer:
            raise ClusterUnreachable("connection lost")
        return {"job": number}

    def _find(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if (error := self.queue_error or self.accounting_error) is not None:
            return {"error": error}
        return {"jobs": [number for number, job in self.jobs.items() if job.name == request["name"]]}

    def _poll(self, request: Mapping[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {"queue": [], "accounting": [], "messages": {}, "more": []}
        if self.queue_error is not None:
            return answer | {"queue_error": self.queue_error}
        if self.accounting_error is not None:
            answer["accounting_error"] = self.accounting_error
        for number, watched in request["jobs"].items():
            for name, task in self._named(number).items():
                if task.state:
                    answer["queue"].append([name, task.state, task.reason, "node1"])
                elif task.account is not None and self.accounting_error is None:
                    row = {**COLUMNS, **task.account}
                    answer["accounting"] += [{"JobID": name, **row}, {"JobID": f"{name}.batch", **row}]
                offset = watched["tasks"].get(name)
                if offset is not None and task.more:
                    answer["more"].append(name)
                elif offset is not None and len(task.said) > offset and watched["messages"]:
                    answer["messages"][name] = [len(task.said), task.said[offset:]]
        return answer

    def _cancel(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self.queue_error is not None:
            return {"error": self.queue_error}
        for number in self.jobs:
            for name, task in self._named(number).items():
                if {name, number} & set(request["jobs"]) and task.state:
                    task.end("CANCELLED by 0")
                    self.cancelled.append(task.key)
        return {}

    def _tail(self, request: Mapping[str, Any]) -> dict[str, Any]:
        logs = {}
        for name, path in request["files"].items():
            folder, index = Path(path).parts[-3], int(Path(path).stem)
            logs[name] = next(job for job in self.jobs.values() if job.name == folder).tasks[index].log
        return {"tails": logs}

    def _remove(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.removed.append(request["folder"])
        return {}

    def _named(self, number: str) -> dict[str, Simulated]:
        job = self.jobs.get(number)
        if job is None:
            return {}
        single = len(job.tasks) == 1
        return {number if single else f"{number}_{index}": task for index, task in enumerate(job.tasks)}


class Killed(BaseException):
    """Stands for the end of a process."""


def _die() -> None:
    raise Killed


def _key(task: str) -> str:
    return Path(Task.from_json(task).call.arguments["tar"]).stem


@dataclass
class Recorder:
    """A run that follows; `running` are other runs in progress."""

    running: set[str] = field(default_factory=set)
    lines: list[tuple[int, str]] = field(default_factory=list)
    attached: list[str] = field(default_factory=list)
    submitted_jobs: list[str] = field(default_factory=list)

    def log(self, level: int, text: str) -> None:
        self.lines.append((level, text))

    def submitted(self, submission: SubmissionRecord, *, attached: bool) -> None:
        (self.attached if attached else self.submitted_jobs).append(str(submission.job))

    def in_progress(self, run_id: str) -> bool:
        return run_id in self.running

    def has_ended(self, run_id: str) -> bool:
        return run_id not in self.running

    def text(self, level: int = 0) -> str:
        return "\n".join(line for at, line in self.lines if at >= level)


@dataclass
class Bench:
    """A lake, a cluster, and runs of one asset on it."""

    folder: Path
    cluster: SimulatedCluster = field(default_factory=SimulatedCluster)

    def settings(self, **compute: Any) -> Settings:
        return Settings(compute=compute, base_dir=self.folder)  # type: ignore[arg-type]

    def calls(self, *keys: str, **compute: Any) -> dict[str, StageCall]:
        settings = self.settings(**compute)
        out = str(self.folder / "out")
        return {key: StageCall("ingest", {"tar": f"/raw/{key}.tar", "output_dir": out}, settings) for key in keys}

    def engine(self, observer: Recorder | None = None, *, run_id: str = "run-1", **compute: Any) -> Engine:
        cluster, told = self.cluster, observer or Recorder()
        settings = self.settings(**compute)
        scheduler = Scheduler(
            cluster,
            lambda text: told.log(30, text),
            settings.compute.accounting_patience_s,
            pause=cluster.pause,
            clock=cluster.clock,
        )
        return Engine(
            settings, "intermediates", scheduler, told,
            python=Path("/env/bin/python"), run_id=run_id, pause=cluster.pause, clock=cluster.clock,
        )  # fmt: skip

    def run(
        self, *keys: str, observer: Recorder | None = None, run_id: str = "run-1", **compute: Any
    ) -> Iterator[Done]:
        return self.engine(observer, run_id=run_id, **compute).run(self.calls(*keys, **compute))

    def abandon(self, *keys: str, run_id: str) -> None:
        """A run submits and its process dies at its first look."""
        self.cluster.step(_die)
        with pytest.raises(Killed):
            list(self.run(*keys, run_id=run_id))

    def artifact(self, key: str) -> Path:
        return self.folder / "out" / f"{key}.parquet"

    def make(self, key: str, content: str = "rows") -> Report:
        """An artifact as a stage leaves it."""
        path = self.artifact(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        report = Report("ingest", path, rows=3, rows_in=4, kept=3, rejected={"bad": 1})
        record_artifact(path, "key", Provenance("ingest", "1", "c"), report)
        return report

    def succeed(self, key: str, job: int = -1) -> None:
        """The task runs and ends well, with everything a success needs."""
        task = self.cluster.task(key, job)
        task.start()
        task.tell(report=self.make(key).to_json())
        task.end("COMPLETED")

    def fail(self, key: str, state: str = "FAILED", exit_code: str = "1:0", job: int = -1, **columns: str) -> None:
        """The task runs and ends badly without a word."""
        task = self.cluster.task(key, job)
        task.start()
        task.end(state, exit_code, **columns)
