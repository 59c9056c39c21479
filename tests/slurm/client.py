"""What a test does with the running cluster: submit, look, wait, break things."""

from __future__ import annotations

import getpass
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.slurm.cluster.cluster import Cluster
from tests.slurm.cluster.layout import DAEMONS, NODES

Value = TypeVar("Value")

FINAL_STATES = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)
_FIELDS = ("JobID", "State", "ExitCode", "ElapsedRaw", "MaxRSS", "ReqMem", "NodeList", "AllocTRES")


class CommandFailed(RuntimeError):
    """A SLURM command did not exit with 0; the message has its arguments and what it said."""


@dataclass(frozen=True)
class SshAccess:
    """How to reach the login node: an sshd on loopback with a host key of its own."""

    host: str
    port: int
    user: str
    key: Path
    known_hosts: Path

    def argv(self, *command: str) -> list[str]:
        """ssh with strict host keys and no configuration of the caller's."""
        options = ["BatchMode=yes", "StrictHostKeyChecking=yes", f"UserKnownHostsFile={self.known_hosts}"]
        flags = [part for option in [*options, "IdentitiesOnly=yes"] for part in ("-o", option)]
        address = f"{self.user}@{self.host}"
        return ["ssh", "-F", "none", *flags, "-i", str(self.key), "-p", str(self.port), address, *command]


@dataclass(frozen=True)
class Accounted:
    """One row of sacct: the job, a task, or a step such as `.batch`.

    Accounting learns of a job in pieces: for some seconds a running job may be PENDING here, and a finished one lack
    what it asked for (`requested_memory` "16?", which is sacct's word for nothing).
    """

    id: str
    state: str
    exit_code: str
    elapsed_s: int
    max_rss: str
    requested_memory: str
    nodes: str
    tres: str


@dataclass
class Slurm:
    """A cluster that runs. `work` is a folder that login node and nodes share."""

    cluster: Cluster
    work: Path = field(init=False)
    ssh: SshAccess = field(init=False)

    def __post_init__(self) -> None:
        layout = self.cluster.layout
        self.work = layout.work
        keys = (layout.ssh / "id_ed25519", layout.ssh / "known_hosts")
        self.ssh = SshAccess("127.0.0.1", layout.port("sshd"), getpass.getuser(), *keys)

    @property
    def conf(self) -> Path:
        """The value of SLURM_CONF."""
        return self.cluster.layout.conf

    @property
    def env(self) -> dict[str, str]:
        """This process's environment with SLURM_CONF set, for commands on the login node itself."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def run(self, *argv: str, timeout_s: float = 60) -> str:
        """What a command printed, without its last line end. Raises CommandFailed."""
        done = self._command(argv, timeout_s)
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise CommandFailed(f"{' '.join(argv)} exited with {done.returncode}: {said}")
        return done.stdout.rstrip("\n")

    def sbatch(self, *options: str, run: Sequence[str] = ("true",)) -> str:
        """Submit a job that becomes the program `run`; its id.

        The program replaces the batch shell, so that a signal to the batch step reaches it. What it prints is `log(id)`
        unless the options say otherwise.
        """
        script = self.work / "exec.sh"
        if not script.exists():
            script.write_text('#!/bin/sh\nexec "$@"\n')
        logs = self.work / "logs"
        logs.mkdir(exist_ok=True)
        places = (f"--chdir={self.work}", f"--output={logs}/%j.out")
        return self.run("sbatch", "--parsable", *places, *options, str(script), *run).split(";")[0]

    def log(self, job: str) -> str:
        """What a job printed so far."""
        path = self.work / "logs" / f"{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def queued(self, job: str) -> list[str]:
        """The states squeue has for a job and its array tasks; empty once the controller has forgotten it."""
        try:
            return self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").split()
        except CommandFailed as failure:
            if "Invalid job id" in str(failure):
                return []
            raise

    def state(self, job: str) -> str:
        """The state of a job or one array task: the controller's word while it knows it, afterwards accounting's."""
        if states := self.queued(job):
            return states[0]
        rows = self.accounted(job)
        return rows[0].state if rows else "UNKNOWN"

    def accounted(self, job: str, *, every_run: bool = False) -> list[Accounted]:
        """The rows of sacct, steps included; with `every_run` also those of runs before a requeue."""
        extra = ["--duplicates"] if every_run else []
        out = self.run("sacct", "-n", "-P", *extra, "-j", job, f"--format={','.join(_FIELDS)}")
        rows = []
        for line in out.splitlines():
            name, state, exit_code, elapsed, *rest = line.split("|")
            rows.append(Accounted(name, state.split(" ")[0], exit_code, int(elapsed or 0), *rest))
        return rows

    def jobs(self) -> list[str]:
        """Ids of every job and task that is pending, running or completing."""
        return self.run("squeue", "-h", "-r", "-o", "%i").split()

    def cancel(self, *jobs: str) -> None:
        """scancel."""
        self.run("scancel", *jobs)

    def cancel_everything(self) -> None:
        """Leave an empty queue behind."""
        if self.jobs():
            self.run("scancel", "--user", getpass.getuser())
            self.wait_for(lambda: not self.jobs(), what="an empty queue")

    def start(self, *daemons: str) -> None:
        """Start, or thaw, daemons of `cluster.layout.DAEMONS`; return when they serve."""
        for name in daemons:
            self.cluster.start(name)

    def stop(self, *daemons: str, hard: bool = False) -> None:
        """Stop daemons; `hard` means SIGKILL."""
        for name in daemons:
            self.cluster.stop(name, hard=hard)

    def heal(self) -> None:
        """Everything up again, whatever a test stopped, froze or drained; returns when both nodes take jobs."""
        for name in DAEMONS:
            self.cluster.thaw(name)
            if name in NODES and "DRAIN" in self.cluster.node_troubles(name):
                self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
            self.cluster.start(name)

    def wait_for(
        self, predicate: Callable[[], Value], timeout_s: float = 120, *, what: str = "it", every_s: float = 0.2
    ) -> Value:
        """The predicate's first true value. Raises TimeoutError with what was waited for, the last value, the queue."""
        end = time.monotonic() + timeout_s
        while not (value := predicate()):
            if time.monotonic() > end:
                queue = self._command(["squeue", "-a"], 60)
                raise TimeoutError(f"{what}: still {value!r} after {timeout_s:.0f} s; the queue:\n{queue.stdout}")
            time.sleep(every_s)
        return value

    def wait_state(self, job: str, *states: str, timeout_s: float = 120) -> str:
        """Wait until a job is in one of the states; which. Fails at once when it ended in another."""

        def reached() -> str:
            state = self.state(job)
            if state in FINAL_STATES and state not in states:
                raise AssertionError(f"job {job} ended as {state}, expected {' or '.join(states)}: {self.log(job)!r}")
            return state if state in states else ""

        return self.wait_for(reached, timeout_s, what=f"job {job} in {' or '.join(states)}")

    def ended(self, job: str, timeout_s: float = 120) -> Accounted:
        """The job's row of sacct once it is over; steps are left out.

        While the controller knows a job it has the last word: a requeued one still has its former end in accounting.
        """

        def final() -> Accounted | None:
            if not FINAL_STATES.issuperset(self.queued(job)):
                return None
            rows = [row for row in self.accounted(job) if row.id == job]
            return rows[0] if rows and rows[0].state in FINAL_STATES else None

        row = self.wait_for(final, timeout_s, what=f"the end of job {job}")
        assert row is not None
        return row

    def _command(self, argv: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
        )
