"""What following 10,000 queued tasks costs this machine: share of one core over the first hour of waiting.

The engine, its transport and the script beside the scheduler run as they do on a login node; `squeue` and `sbatch` are
shell scripts that answer at that size, so what the scheduler's own commands cost is not in the figure. Time is not
waited but counted: an hour passes in the seconds that its looks take. Bar: 1 % of a core.

    python -m benchmarks.waiting [--tasks 10000]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.harness import RESULTS
from spatial_core.cluster.engine import Engine
from spatial_core.cluster.ledger import SubmissionRecord
from spatial_core.cluster.scheduler import Scheduler
from spatial_core.cluster.transport import ThisHost
from spatial_core.config.settings import Settings
from spatial_core.jobs.registry import StageCall

BAR = 0.01
HOUR_S = 3600.0
TASKS_A_JOB = 1000
RUNNING = 50  # of each array, the default limit


@dataclass(frozen=True)
class Waiting:
    """What waiting took.

    Args:
        tasks: followed.
        looks: at the scheduler.
        cpu_s: CPU seconds of all looks, child processes included.
        share: of one core.
        last_look_cpu_s: of one look when looks are rarest.
        peak_mb: largest resident memory of the following process, MB of 1e6 bytes.
        submit_cpu_s: CPU seconds of rendering and submitting everything, not part of the share.
    """

    tasks: int
    looks: int
    cpu_s: float
    share: float
    last_look_cpu_s: float
    peak_mb: float
    submit_cpu_s: float


class _Silent:
    def log(self, level: int, text: str) -> None:
        """Nobody watches."""

    def submitted(self, submission: SubmissionRecord, *, attached: bool) -> None:
        """Nobody watches."""

    def in_progress(self, run_id: str) -> bool:
        return False


class _WaitOver(BaseException):
    """Ends the wait."""


class _Clock:
    """Counts the time that would be waited, and the CPU seconds that really pass between two waits."""

    def __init__(self, wait_s: float) -> None:
        self.wait_s = wait_s
        self.waited_s = 0.0
        self.looks: list[float] = []
        self.submit_cpu_s: float | None = None
        self._since = _cpu_seconds()

    def pause(self, seconds: float) -> None:
        spent, self._since = _cpu_seconds() - self._since, _cpu_seconds()
        if self.submit_cpu_s is None:
            self.submit_cpu_s = spent
        else:
            self.looks.append(spent)
        if self.waited_s >= self.wait_s:
            raise _WaitOver
        self.waited_s += seconds


def measure(tasks: int, folder: Path, wait_s: float = HOUR_S) -> Waiting:
    """Follow `tasks` calls for a time in which nothing happens."""
    _fake_commands(folder / "bin", tasks)
    os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    settings = Settings(base_dir=folder)
    calls = {
        f"{number:05}": StageCall("ingest", {"tar": f"{number:05}.tar", "output_dir": str(folder / "out")}, settings)
        for number in range(tasks)
    }
    clock = _Clock(wait_s)
    scheduler = Scheduler(ThisHost(), lambda text: None, 60.0)
    engine = Engine(
        settings, "intermediates", scheduler, _Silent(), python=Path(sys.executable), run_id="run", pause=clock.pause
    )
    try:
        outcomes = list(engine.run(calls))
    except _WaitOver:
        outcomes = []
    assert not outcomes, "nothing was to happen"
    cpu_s = sum(clock.looks)
    return Waiting(
        tasks=tasks,
        looks=len(clock.looks),
        cpu_s=round(cpu_s, 2),
        share=round(cpu_s / clock.waited_s, 5),
        last_look_cpu_s=round(sorted(clock.looks[-20:])[10], 4),
        peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
        submit_cpu_s=round(clock.submit_cpu_s or 0, 2),
    )


def _fake_commands(folder: Path, tasks: int) -> None:
    """sbatch hands out job ids; squeue knows arrays of which some tasks run and the rest wait."""
    folder.mkdir(parents=True)
    rows = []
    for job in range(-(-tasks // TASKS_A_JOB)):
        size = min(TASKS_A_JOB, tasks - job * TASKS_A_JOB)
        rows.append(f"{1000 + job}_[{RUNNING}-{size - 1}%{RUNNING}]|PENDING|Priority|")
        rows += [f"{1000 + job}_{index}|RUNNING|None|node{index}" for index in range(min(RUNNING, size))]
    (folder / "answer").write_text("\n".join(rows) + "\n")
    scripts = {
        "squeue": f"cat {folder}/answer\n",
        "sbatch": f"n=$(cat {folder}/next 2>/dev/null || echo 1000); echo $((n + 1)) > {folder}/next; echo $n\n",
        "sacct": "exit 0\n",
    }
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}")
        (folder / name).chmod(0o755)


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def main() -> int:
    """Measure, print, write `results/waiting.json`; 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000)
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="spatial-waiting-") as folder:
        found = measure(arguments.tasks, Path(folder))
    RESULTS.mkdir(exist_ok=True)
    record = {**asdict(found), "bar": BAR, "met": found.share <= BAR}
    (RESULTS / "waiting.json").write_text(json.dumps(record, indent=2) + "\n")
    Console().print(record, f"measured in {time.perf_counter() - began:.0f} s")
    return 0 if record["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
