"""One daemon of the cluster: started in the foreground under our own pid record, stopped by it and by nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil


class ClusterError(RuntimeError):
    """The cluster did not do what was asked; the message names the daemon and ends with its log."""


@dataclass(frozen=True)
class Daemon:
    """A program and how to tell that it serves.

    `unready` is asked repeatedly after a start and answers why the daemon does not serve yet, or with nothing once it
    does. `log` receives what the program prints.
    """

    name: str
    argv: tuple[str, ...]
    environment: dict[str, str]
    pid_file: Path
    log: Path
    unready: Callable[[], str]

    def process(self) -> psutil.Process | None:
        """The running process, or None. A pid that another program has got meanwhile is not taken for ours."""
        if not self.pid_file.exists():
            return None
        pid, started = self.pid_file.read_text().split()
        try:
            process = psutil.Process(int(pid))
            recycled = abs(process.create_time() - float(started)) > 2
            if recycled or process.status() == psutil.STATUS_ZOMBIE:
                return None
        except psutil.NoSuchProcess:
            return None
        return process

    def start(self, timeout_s: float = 60) -> None:
        """Start unless it runs; return once it serves. Raises ClusterError when it ends or does not get ready."""
        process = self.process()
        if process is None:
            with self.log.open("ab") as log:
                child = subprocess.Popen(
                    self.argv,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd="/",
                    start_new_session=True,
                )
            process = psutil.Process(child.pid)
            self.pid_file.write_text(f"{child.pid} {process.create_time()!r}")
        end = time.monotonic() + timeout_s
        while why := self.unready():
            if self.process() is None:
                raise ClusterError(f"{self.name} ended while starting: {self.last_words()}")
            if time.monotonic() > end:
                raise ClusterError(f"{self.name} not ready in {timeout_s:.0f} s, {why}; its log: {self.last_words()}")
            time.sleep(0.05)

    def stop(self, *, hard: bool = False, timeout_s: float = 30) -> None:
        """End it with SIGTERM, or at once with SIGKILL, and return when it is gone. What does not run stays so."""
        process = self.process()
        if process is not None:
            process.send_signal(signal.SIGKILL if hard else signal.SIGTERM)
            process.send_signal(signal.SIGCONT)
            if not _gone(process, timeout_s):
                process.kill()
                _gone(process, timeout_s)
                raise ClusterError(f"{self.name} did not end within {timeout_s:.0f} s of SIGTERM: {self.last_words()}")
        self.pid_file.unlink(missing_ok=True)

    def last_words(self) -> str:
        """The end of its log on one line."""
        lines = self.log.read_text(errors="replace").splitlines()[-8:] if self.log.exists() else []
        return " | ".join(lines) or f"nothing in {self.log}"


def _gone(process: psutil.Process, timeout_s: float) -> bool:
    """Whether the process ends in time; one that nobody has waited for counts as ended."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def kill_all(processes: list[psutil.Process]) -> None:
    """SIGKILL in the given order, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def processes_where(condition: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """Every process, except this one, that meets the condition; what may not be looked at is none of ours."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.pid != os.getpid() and condition(process):
                found.append(process)
    return found
