"""Calls that an engine follows on the test cluster, each in a thread of its own, so that many can wait at once."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatial_core.cluster.engine import Engine
from spatial_core.cluster.following import Done
from spatial_core.cluster.ledger import SubmissionRecord
from spatial_core.cluster.scheduler import Scheduler
from spatial_core.cluster.transport import transport_for
from spatial_core.config.settings import Settings
from spatial_core.jobs.registry import StageCall
from tests.data.make_tars import street_view, tar_bytes
from tests.slurm.client import Slurm

REPOSITORY = Path(__file__).parents[2]
MODEST = {"cpus": 1, "mem": "1500M", "gpus": "0", "time_limit": "00:05:00"}
END_S = 240


@dataclass
class Watcher:
    """The observer of one engine: what it was told."""

    lines: list[str] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)

    def log(self, level: int, text: str) -> None:
        self.lines.append(f"{logging.getLevelName(level)} {text}")

    def submitted(self, submission: SubmissionRecord, *, attached: bool) -> None:
        self.jobs.append(str(submission.job))

    def in_progress(self, run_id: str) -> bool:
        return False

    def has_ended(self, run_id: str) -> bool:
        return False

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@dataclass
class Case:
    """A call on its way.

    Args:
        key: partition key.
        watcher: who is told.
        outcome: how it will end.
    """

    key: str
    watcher: Watcher
    outcome: Future[Done]

    def job(self, number: int = 0) -> str:
        """Its job id, or that of a later try, once there is one."""
        deadline = time.monotonic() + END_S
        while len(self.watcher.jobs) <= number:
            if self.outcome.done():
                self.outcome.result()
            assert time.monotonic() < deadline, f"{self.key}: no job; {self.watcher.text}"
            time.sleep(0.05)
        return self.watcher.jobs[number]

    def done(self) -> Done:
        """How it ended."""
        return self.outcome.result(timeout=END_S)


class FollowedLake:
    """A folder that the nodes share, with a small tar for each call.

    Args:
        folder: where.
        slurm: the cluster.
    """

    def __init__(self, folder: Path, slurm: Slurm) -> None:
        self.folder = folder
        self.slurm = slurm
        self.blows: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(40)
        self._closed = threading.Event()
        self._number = 100
        self._drawing = threading.Lock()

    def settings(self, *setup: str, **compute: Any) -> Settings:
        """Settings of the cluster; `setup` are lines of the job's script, before the stage."""
        own = {name: compute.pop(name) for name in ("mem", "time_limit", "partition", "extra") if name in compute}
        sections: dict[str, Any] = {
            "paths": {"data_dir": str(self.folder)},
            "compute": {
                "profile": "slurm_login",
                "poll_s": 0.5,
                "poll_max_s": 2.0,
                "setup": (f"export PYTHONPATH={REPOSITORY}", *setup),
                "resources": {"intermediates": MODEST | own, "backbone_embeddings": MODEST | own},
                **compute,
            },
        }
        if compute.get("profile") == "slurm_ssh":
            ssh = self.slurm.ssh
            places = {"ssh_host": ssh.host, "ssh_port": ssh.port, "ssh_user": ssh.user}
            files = {"ssh_key": ssh.key, "ssh_known_hosts": ssh.known_hosts}
            sections["compute"] = places | files | sections["compute"]
        return Settings(**sections, base_dir=self.folder)

    def tar(self, *, damaged: bool = False) -> Path:
        """A new tar with a few pictures."""
        with self._drawing:
            self._number += 1
            number = self._number
        path = self.folder / "raw" / f"{number:04}.tar"
        path.parent.mkdir(exist_ok=True)
        data = tar_bytes(street_view(number, seed=number, targets=2, side_px=64))
        path.write_bytes(data[: len(data) // 3] if damaged else data)
        return path

    def ingest(self, *setup: str, damaged: bool = False, **compute: Any) -> Case:
        """Send the ingestion of a new tar on its way."""
        tar = self.tar(damaged=damaged)
        settings = self.settings(*setup, **compute)
        call = StageCall("ingest", {"tar": str(tar), "output_dir": str(self.folder / "intermediates")}, settings)
        return self.follow("intermediates", tar.stem, call)

    def follow(self, asset: str, key: str, call: StageCall, *, pause: Callable[[float], None] | None = None) -> Case:
        """Send a call on its way."""
        watcher = Watcher()
        engine = self.engine(asset, call.settings, watcher, pause=pause)

        def only() -> Done:
            (done,) = engine.run({key: call})
            return done

        return Case(key, watcher, self._pool.submit(only))

    def deal(self, blow: Callable[[], object]) -> None:
        """Let something happen meanwhile; `blows` tells whether it could be dealt."""
        self.blows.append(self._pool.submit(lambda: blow() and None))

    def engine(
        self,
        asset: str,
        settings: Settings,
        watcher: Watcher,
        *,
        run_id: str = "run",
        pause: Callable[[float], None] | None = None,
    ) -> Engine:
        """An engine as a run has it."""
        patience = settings.compute.accounting_patience_s
        scheduler = Scheduler(transport_for(settings), lambda text: watcher.log(logging.WARNING, text), patience)
        python = settings.compute.python or Path(sys.executable)
        return Engine(settings, asset, scheduler, watcher, python=python, run_id=run_id, pause=pause or self._pause)

    def close(self) -> None:
        """Wait for nothing any more."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    def _pause(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise InterruptedError("the tests are over")


def python_that_runs(folder: Path, name: str, script: str) -> Path:
    """An interpreter for the nodes that runs a script in place of `-m spatial_core.jobs`."""
    (folder / f"{name}.py").write_text(script)
    python = folder / name
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {folder}/{name}.py "$@"\n')
    python.chmod(0o755)
    return python
