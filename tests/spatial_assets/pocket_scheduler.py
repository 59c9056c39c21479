"""sbatch, squeue, sacct and scancel for jobs that are processes of the test: everything around them is real.

What a real SLURM does is tested in tests/slurm; this is for what must not depend on one, such as which job is followed,
and for ends that no scheduler brings about on request.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatial_core.cluster import beside_scheduler


@dataclass
class Task:
    """One job or task of an array; without a process it is waiting."""

    script: str
    options: dict[str, str]
    name: str
    process: subprocess.Popen[bytes] | None = None
    cancelled: bool = False

    @property
    def state(self) -> str:
        if self.cancelled:
            return "CANCELLED"
        if self.process is None:
            return "PENDING"
        code = self.process.poll()
        return "RUNNING" if code is None else "COMPLETED" if code == 0 else "FAILED"

    @property
    def exit_code(self) -> str:
        code = (self.process.poll() if self.process is not None else None) or 0
        return f"{code}:0" if code >= 0 else f"0:{-code}"


@dataclass
class PocketScheduler:
    """A transport whose scheduler is this object.

    Args:
        held: jobs wait until `release`.
        accounting: whether sacct answers.
        restarts: a job that ends well is started again this many times first, as when it was requeued.
    """

    held: bool = False
    accounting: bool = True
    restarts: int = 0
    tasks: dict[str, Task] = field(default_factory=dict)
    submissions: list[dict[str, str]] = field(default_factory=list)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of what runs beside a scheduler."""
        answer: dict[str, Any] = getattr(beside_scheduler, request["do"])(dict(request))
        return answer

    def command(self, argv: list[str], text: str | None = None) -> tuple[int, str, str]:
        """In place of running a scheduler command."""
        done: tuple[int, str, str] = getattr(self, f"_{argv[0]}")(argv[1:])
        return done

    def release(self) -> None:
        """Start what waits."""
        self.held = False
        for task in self.tasks.values():
            if task.state == "PENDING":
                self._start(task)

    def end(self) -> None:
        """End what still runs."""
        for task in self.tasks.values():
            if task.process is not None and task.process.poll() is None:
                task.process.kill()
                task.process.wait()

    def _sbatch(self, arguments: list[str]) -> tuple[int, str, str]:
        options = dict(argument.partition("=")[::2] for argument in arguments[1:-1])
        self.submissions.append(options)
        job = str(700 + len(self.submissions))
        last = options.get("--array", "").partition("%")[0].partition("-")[2]
        names = [f"{job}_{index}" for index in range(int(last) + 1)] if last else [job]
        for name in names:
            self.tasks[name] = Task(arguments[-1], options, name)
            if not self.held:
                self._start(self.tasks[name])
        return 0, f"{job}\n", ""

    def _start(self, task: Task) -> None:
        job, _, index = task.name.partition("_")
        environment = {**os.environ, "SLURM_JOB_ID": job, **({"SLURM_ARRAY_TASK_ID": index} if index else {})}
        log = Path(task.options["--output"].replace("%a", index))
        with log.open("ab") as output:
            task.process = subprocess.Popen(
                ["bash", task.script],
                cwd=task.options["--chdir"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def _squeue(self, arguments: list[str]) -> tuple[int, str, str]:
        jobs = arguments[arguments.index("-j") + 1].split(",")
        rows = []
        for name, task in self.tasks.items():
            if task.state == "COMPLETED" and self.restarts:
                self.restarts -= 1
                self._start(task)
            if name.partition("_")[0] in jobs and task.state in ("PENDING", "RUNNING"):
                rows.append(f"{name}|{task.state}|{'Resources' if task.state == 'PENDING' else 'None'}|")
        return 0, "\n".join(rows), ""

    def _sacct(self, arguments: list[str]) -> tuple[int, str, str]:
        if not self.accounting:
            return 1, "", "Problem talking to the database: Connection refused"
        jobs = arguments[arguments.index("-j") + 1].split(",")
        fields = arguments[-1].removeprefix("--format=").split(",")
        rows = []
        for name, task in self.tasks.items():
            if name.partition("_")[0] not in jobs:
                continue
            row = {
                "JobID": name, "State": task.state, "ExitCode": task.exit_code, "ElapsedRaw": "20",
                "TotalCPU": "00:10.000", "CPUTimeRAW": "40", "NodeList": "node1", "Partition": "cpu",
                "AllocTRES": "billing=2,cpu=2,gres/gpu=1,mem=4G,node=1", "ReqMem": "4G", "Start": "s", "End": "e",
            }  # fmt: skip
            rows.append(row)
            rows.append({**row, "JobID": f"{name}.batch", "MaxRSS": "524288K"})
        return 0, "\n".join("|".join(row.get(field, "") for field in fields) for row in rows), ""

    def _scancel(self, arguments: list[str]) -> tuple[int, str, str]:
        for name in arguments:
            task = self.tasks[name]
            task.cancelled = True
            if task.process is not None:
                task.process.send_signal(signal.SIGTERM)
                task.process.wait()
        return 0, "", ""
