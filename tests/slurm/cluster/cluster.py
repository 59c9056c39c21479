"""A real SLURM on this machine, on loopback only: its daemons started, stopped, killed and frozen one by one.

Two slurmd processes play two nodes: node1 has CPUs only, node2 two GPUs that are none. Partitions: `cpu` (node1),
`gpu` (node2), `both`, and, over both nodes, `scavenge` (preempted by cancelling), `scavenge_requeue` (preempted by
requeueing) and `urgent` (preempts these two).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.slurm.cluster.configuration import CLUSTER, write_all
from tests.slurm.cluster.daemon import ClusterError, Daemon, kill_all, processes_where
from tests.slurm.cluster.layout import (
    DAEMONS,
    NODES,
    SYSTEM_PATH,
    Layout,
    missing_packages,
    program,
)

_PRIVILEGE_SEPARATION = Path("/run/sshd")
"""An empty folder that Debian's sshd insists on and its service would make."""


@dataclass
class Cluster:
    """The cluster of one folder, whether it runs or not."""

    layout: Layout
    daemons: dict[str, Daemon] = field(init=False)

    def __post_init__(self) -> None:
        layout = self.layout
        commands: dict[str, tuple[tuple[str, ...], Callable[[], str]]] = {
            "munged": (self._munged(), lambda: _refused(socket.AF_UNIX, str(layout.munge / "munge.sock"))),
            "mariadbd": (self._mariadbd(), lambda: self._not_listening("mariadbd")),
            "slurmdbd": (("slurmdbd", "-D"), lambda: self._complaint("sacctmgr", "-n", "list", "cluster")),
            "slurmctld": (("slurmctld", "-D"), lambda: self._complaint("scontrol", "ping")),
            "node1": (("slurmd", "-D", "-N", "node1"), lambda: self.node_troubles("node1")),
            "node2": (("slurmd", "-D", "-N", "node2"), lambda: self.node_troubles("node2")),
            "sshd": (
                ("sshd", "-D", "-e", "-f", str(layout.ssh / "sshd_config")),
                lambda: self._not_listening("sshd"),
            ),
        }
        self.daemons = {name: self._daemon(name, *commands[name]) for name in DAEMONS}

    @property
    def environment(self) -> dict[str, str]:
        """What a daemon is started with: nothing of the caller's but where SLURM's files lie."""
        return {"PATH": SYSTEM_PATH, "LANG": "C.UTF-8", "SLURM_CONF": str(self.layout.conf)}

    @property
    def kills_for_memory(self) -> bool:
        """Whether a job beyond its memory ends as OUT_OF_MEMORY, by memory cgroups, rather than FAILED 0:9."""
        return "TaskPlugin=task/cgroup" in self.layout.conf.read_text()

    def up(self) -> None:
        """Start everything that does not run yet; return when both nodes take jobs.

        Raises ClusterError when packages or rights are missing or a daemon does not start.
        """
        check_possible()
        self.layout.make_folders()
        _PRIVILEGE_SEPARATION.mkdir(exist_ok=True)
        with self._locked():
            write_all(self.layout)
            for name in DAEMONS:
                if name == "mariadbd":
                    self._install_database()
                if name == "slurmctld":
                    self._register()
                self.start(name)

    def down(self) -> None:
        """Cancel every job and end every daemon, and what a killed one left behind; nothing of anybody else's."""
        stubborn: list[ClusterError] = []
        with self._locked():
            for name in reversed(DAEMONS):
                self.thaw(name)
            if self.running("slurmctld"):
                self._cancel_all()
            for name in reversed(DAEMONS):
                try:
                    self.stop(name)
                except ClusterError as error:  # it was killed; the others still have to go
                    stubborn.append(error)
                if name in NODES:
                    self._kill_processes_of(name)
            kill_all(self.login_processes())
        if stubborn:
            raise stubborn[0]

    def running(self, name: str) -> bool:
        """Whether a daemon's process exists, frozen or not."""
        return self.daemons[name].process() is not None

    def start(self, name: str, timeout_s: float = 60) -> None:
        """Start a daemon, or thaw one that is frozen, and wait until it serves."""
        self.thaw(name)
        self.daemons[name].start(timeout_s)

    def stop(self, name: str, *, hard: bool = False) -> None:
        """End one daemon, with SIGKILL when `hard`.

        A node's jobs go on without its slurmd (see `power_off`). Connections do not go on without sshd, as when the
        login node's network is cut; what runs there does.
        """
        sessions = self._ssh_sessions() if name == "sshd" else []
        self.daemons[name].stop(hard=hard)
        kill_all(sessions)

    def freeze(self, name: str) -> None:
        """Stop a daemon from answering while its connections stay open (SIGSTOP), as on an overloaded host."""
        if (process := self.daemons[name].process()) is not None:
            process.suspend()

    def thaw(self, name: str) -> None:
        """Let a frozen daemon go on."""
        if (process := self.daemons[name].process()) is not None:
            process.send_signal(signal.SIGCONT)

    def power_off(self, node: str) -> None:
        """End a node's slurmd, its step daemons and every process of its jobs at once, as when its power fails."""
        self.daemons[node].stop(hard=True)
        self._kill_processes_of(node)

    def login_processes(self) -> list[psutil.Process]:
        """What runs on the login node for somebody who came, or had come, by ssh; sessions outlive their connection."""
        conf = str(self.layout.conf)
        return processes_where(
            lambda process: process.environ().get("SLURM_CONF") == conf and "SSH_CONNECTION" in process.environ()
        )

    def node_troubles(self, node: str) -> str:
        """Why a node takes no jobs, or nothing: slurmd must listen and a controller that runs must know of it."""
        if silent := self._not_listening(node):
            return silent
        if not self.running("slurmctld"):
            return ""
        line = self._command("scontrol", "--oneliner", "show", "node", node).stdout
        state = line.partition(" State=")[2].partition(" ")[0]
        base, *flags = state.split("+")
        serves = base in {"IDLE", "MIXED", "ALLOCATED"} and not {"DRAIN", "NOT_RESPONDING"}.intersection(flags)
        return "" if serves else f"the controller has it as {state or 'unknown'}"

    def _daemon(self, name: str, argv: tuple[str, ...], unready: Callable[[], str]) -> Daemon:
        files = (self.layout.run / f"{name}.pid", self.layout.log / f"{name}.out")
        absolute = (program(argv[0]), *argv[1:]) if not missing_packages() else argv
        return Daemon(name, absolute, self.environment, *files, unready)

    def _munged(self) -> tuple[str, ...]:
        folder = self.layout.munge
        files = {"key": "key", "pid": "own", "log": "log", "seed": "seed"}
        options = [f"--{option}-file={folder}/munge.{suffix}" for option, suffix in files.items()]
        return ("munged", "--foreground", "--force", f"--socket={folder}/munge.sock", *options)

    def _mariadbd(self) -> tuple[str, ...]:
        layout = self.layout
        return (
            "mariadbd",
            "--no-defaults",
            f"--user={psutil.Process().username()}",
            f"--datadir={layout.database}",
            f"--socket={layout.run}/mariadb.sock",
            f"--pid-file={layout.run}/mariadbd.own",
            "--bind-address=127.0.0.1",
            f"--port={layout.port('mariadbd')}",
            f"--init-file={layout.etc}/database.sql",
            "--skip-name-resolve",
            "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",
            "--innodb-flush-log-at-trx-commit=0",
        )

    def _install_database(self) -> None:
        if self.layout.database.exists():
            return
        unfinished = self.layout.root / "database.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        options = (f"--datadir={unfinished}", f"--user={psutil.Process().username()}", "--skip-test-db")
        self._run("mariadb-install-db", "--no-defaults", *options, timeout_s=120)
        unfinished.rename(self.layout.database)

    def _register(self) -> None:
        """Make the cluster known to accounting, which slurmctld needs to find on its first start."""
        if CLUSTER not in self._command("sacctmgr", "-n", "-P", "list", "cluster", "format=cluster").stdout.split():
            self._run("sacctmgr", "-i", "add", "cluster", CLUSTER)

    def _cancel_all(self) -> None:
        """As far as the controller answers; what still runs afterwards is killed with its node."""
        self._command("scancel", "--user", psutil.Process().username())
        end = time.monotonic() + 5
        while self._command("squeue", "-h", "-o", "%i").stdout and time.monotonic() < end:
            time.sleep(0.1)

    def _ssh_sessions(self) -> list[psutil.Process]:
        listener = self.daemons["sshd"].process()
        children = listener.children(recursive=True) if listener is not None else []
        return [child for child in children if child.name().startswith("sshd")]

    def _kill_processes_of(self, node: str) -> None:
        """First the step daemons, which would report how the processes of their jobs ended, then those.

        A step daemon hides its environment behind its title, but keeps its node's log open.
        """
        log = str(self.layout.log / f"{node}.log")
        steps = processes_where(
            lambda process: process.name() == "slurmstepd" and any(file.path == log for file in process.open_files())
        )
        kill_all(steps)
        ours = {"SLURM_CONF": str(self.layout.conf), "SLURMD_NODENAME": node}
        kill_all(processes_where(lambda process: ours.items() <= process.environ().items()))

    def _complaint(self, *argv: str) -> str:
        done = self._command(*argv)
        return f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}" if done.returncode else ""

    def _not_listening(self, daemon: str) -> str:
        return _refused(socket.AF_INET, ("127.0.0.1", self.layout.port(daemon)))

    def _run(self, *argv: str, timeout_s: float = 60) -> None:
        done = self._command(*argv, timeout_s=timeout_s)
        if done.returncode:
            said = f"{done.stdout} {done.stderr}".strip()[-800:]
            raise ClusterError(f"{' '.join(argv)} exited with {done.returncode}: {said}")

    def _command(self, *argv: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            (program(argv[0]), *argv[1:]),
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One command on the folder at a time: two of them would start everything twice."""
        with (self.layout.root / "lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def check_possible() -> None:
    """Raise ClusterError, saying what to do, when packages or rights to start a cluster are missing."""
    if missing := missing_packages():
        raise ClusterError(f"SLURM is not installed; as root: apt-get install {' '.join(missing)}")
    if os.geteuid() != 0:
        raise ClusterError("slurmd gives jobs their user and needs root for it: run this as root")


def _refused(family: socket.AddressFamily, address: Any) -> str:
    with socket.socket(family) as client:
        client.settimeout(5)
        error = client.connect_ex(address)
    return f"{address}: {os.strerror(error)}" if error else ""
