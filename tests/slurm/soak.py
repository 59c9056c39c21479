"""Hundreds of jobs while everything that can be killed is: no false success, no double submission, no orphan.

    make slurm-soak                     or: python -m tests.slurm.soak [--jobs 300] [--seed 1] [--ssh]

Several workers ask the test cluster for partitions. Meanwhile, at random, workers are killed outright (and started
again), tasks are cancelled or requeued, the controller, the accounting daemon and the ssh server are stopped for some
seconds. At the end accounting, artifacts, ledger and queue are compared with what the workers were told.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatial_core.cluster.ledger import Ledger
from spatial_core.jobs.registry import run_stage
from spatial_core.lake.catalogue import CATALOGUE
from spatial_core.storage.provenance import read_manifest
from tests.data.make_tars import street_view, tar_bytes
from tests.slurm.client import CommandFailed, Slurm
from tests.slurm.cluster.cluster import Cluster
from tests.slurm.cluster.layout import Layout
from tests.slurm.lakes import REPOSITORY, ClusterLake

ASSET = "intermediates"
WORKERS = 6


@dataclass
class Worker:
    """A process that wants some keys, and is started again when it was killed."""

    name: str
    keys: list[str]
    lake: ClusterLake
    journal: Path
    process: subprocess.Popen[bytes] | None = None
    kills: int = 0

    def start(self) -> None:
        argv = [sys.executable, "-m", "tests.slurm.soak_worker", str(self.lake.config), self.name, str(self.journal)]
        self.process = subprocess.Popen([*argv, *self.keys], cwd=REPOSITORY, env=self.lake.slurm.env)

    @property
    def finished(self) -> bool:
        return self.process is not None and self.process.poll() == 0

    def look_after(self) -> None:
        """Start it if it is not there."""
        if self.process is None or self.process.poll() not in (None, 0):
            self.start()

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.kills += 1


@dataclass
class Soak:
    """One run of it."""

    slurm: Slurm
    lake: ClusterLake
    dice: random.Random
    workers: list[Worker] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def prepare(self, jobs: int) -> None:
        """Tars, and workers that share them; every tenth key is wanted by two workers."""
        raw = self.lake.settings.locations.raw_dir
        raw.mkdir(parents=True)
        keys = [f"{number:04d}" for number in range(1, jobs + 1)]
        for key in keys:
            (raw / f"{key}.tar").write_bytes(tar_bytes(street_view(int(key), 7, targets=1)))
        for number in range(WORKERS):
            own = keys[number::WORKERS]
            shared = [key for place, key in enumerate(keys) if not place % 10 and (place + 1) % WORKERS == number]
            journal = self.lake.config.parent / f"journal{number}.jsonl"
            self.workers.append(Worker(f"worker{number}", own + shared, self.lake, journal))

    def run(self, patience_s: float) -> None:
        """Let them work, and things befall them, until all are finished."""
        deadline = time.monotonic() + patience_s
        while not all(worker.finished for worker in self.workers):
            for worker in self.workers:
                worker.look_after()
            if time.monotonic() > deadline:
                raise SystemExit(f"not finished within {patience_s:g} s")
            time.sleep(self.dice.uniform(0.5, 3))
            blow = self.dice.choices(
                [self.kill_worker, self.cancel_task, self.requeue_task, self.stop_daemon], [6, 4, 2, 1]
            )[0]
            blow()
        self.slurm.heal()

    def kill_worker(self) -> None:
        worker = self.dice.choice(self.workers)
        if worker.process is not None and worker.process.poll() is None:
            worker.kill()
            self.done["workers killed"] += 1

    def cancel_task(self) -> None:
        self._task("scancel", "tasks cancelled")

    def requeue_task(self) -> None:
        self._task("scontrol requeue", "tasks requeued", running=True)

    def _task(self, command: str, name: str, *, running: bool = False) -> None:
        try:
            tasks = self.slurm.run("squeue", "-h", "-r", *(["-t", "RUNNING"] if running else []), "-o", "%i").split()
            if tasks:
                self.slurm.run(*command.split(), self.dice.choice(tasks))
                self.done[name] += 1
        except CommandFailed:
            self.done["blows that missed"] += 1  # the task ended meanwhile

    def stop_daemon(self) -> None:
        daemon = self.dice.choice(["slurmctld", "slurmdbd", "sshd"])
        self.slurm.stop(daemon)
        time.sleep(self.dice.uniform(1, 8))
        self.slurm.start(daemon)
        self.done[f"{daemon} stopped"] += 1

    def faults(self) -> list[str]:
        """What must not be."""
        settings = self.lake.settings
        told = [record for worker in self.workers for record in _lines(worker.journal)]
        found = []
        for record in told:
            if record.get("made") and read_manifest(Path(record["made"])) is None:
                found.append(f"false success: {record['made']} has no manifest")
        found += self._wrong_artifacts()
        found += _overlaps(self._lives(told))
        self.slurm.wait_for(lambda: not self.slurm.jobs(), 60, what="an empty queue")
        found += [f"unsettled: {record.name}" for record in Ledger(settings.jobs_dir).submissions()]
        known = {str(record["job"]) for record in told if "submission" in record}
        rows = self.slurm.run("sacct", "-n", "-P", "-X", "-S", "now-1days", "--format=JobID").split()
        orphans = {row.partition("_")[0] for row in rows} - known
        found += [f"orphan: job {job} belongs to nobody" for job in sorted(orphans)]
        return found

    def _wrong_artifacts(self) -> list[str]:
        """Artifacts whose bytes are not those of a local run."""
        settings, found = self.lake.settings, []
        with tempfile.TemporaryDirectory() as folder:
            for key in {key for worker in self.workers for key in worker.keys}:
                call = CATALOGUE[ASSET].call(settings, key)
                here = run_stage(type(call)(call.stage, {**call.arguments, "output_dir": folder}, settings))
                there = CATALOGUE[ASSET].path(settings.locations, key)
                if not there.exists() or there.read_bytes() != here.artifact.read_bytes():
                    found.append(f"false success: {there} is not what a local run makes")
        return found

    def _lives(self, told: Iterable[dict[str, Any]]) -> dict[str, list[tuple[str, str, str]]]:
        """Key -> (submitted, ended, task) of every task there was for it."""
        jobs = {str(r["job"]): r["keys"] for r in told if "submission" in r}
        rows = self.slurm.run("sacct", "-n", "-P", "-X", "-S", "now-1days", "--format=JobID,Submit,End").splitlines()
        lives: dict[str, list[tuple[str, str, str]]] = {}
        for row in rows:
            task, submitted, ended = row.split("|")
            job, _, index = task.partition("_")
            if job in jobs and (index.isdigit() or not index):
                lives.setdefault(jobs[job][int(index or 0)], []).append((submitted, ended, task))
        return lives


def _overlaps(lives: dict[str, list[tuple[str, str, str]]]) -> list[str]:
    """Tasks for one key that were there at the same time; accounting's times have whole seconds."""
    found = []
    for key, tasks in lives.items():
        tasks.sort()
        for (_, ended, first), (submitted, _, second) in itertools.pairwise(tasks):
            if ended > submitted:
                found.append(f"double submission: {key} was in {first} (until {ended}) and {second} (from {submitted})")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> int:
    """Run the soak; 1 when anything was found that must not be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=300, help="partitions to make, at least as many jobs")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is random")
    parser.add_argument("--ssh", action="store_true", help="reach the cluster over ssh")
    parser.add_argument("--patience", type=float, default=1800, metavar="SECONDS", help="give up after this long")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spatial-soak-") as folder:
        cluster = Cluster(Layout(Path(folder) / "slurm"))
        cluster.up()
        slurm = Slurm(cluster)
        os.environ["SLURM_CONF"] = str(slurm.conf)
        try:
            lake = ClusterLake(Path(folder) / "config.toml", slurm)
            small = {ASSET: {"mem": "300M", "cpus": 1, "time_limit": "00:10:00"}}
            profile = "slurm_ssh" if given.ssh else "slurm_login"
            lake.write(profile, resources=small, vanished_after_s=60.0)
            soak = Soak(slurm, lake, random.Random(given.seed))
            soak.prepare(given.jobs)
            begun = time.monotonic()
            try:
                soak.run(given.patience)
                found = soak.faults()
            finally:
                for worker in soak.workers:
                    worker.kill()
            tasks = sum(map(len, soak._lives([r for w in soak.workers for r in _lines(w.journal)]).values()))
        finally:
            cluster.down()
    seconds = time.monotonic() - begun
    print(f"{given.jobs} partitions, {tasks} tasks in {seconds:.0f} s; {dict(soak.done)}")  # noqa: T201
    for fault in found:
        print(fault)  # noqa: T201
    print(f"{len(found)} faults")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
