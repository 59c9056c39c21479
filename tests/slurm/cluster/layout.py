"""Where a test cluster keeps its files, which ports it listens on, and which programs it needs.

Ports are chosen when a folder is first used and kept in it, so that several clusters can run on one machine and a
daemon that is stopped and started again comes back where it was. `python3 -m tests.slurm.cluster.layout` prints the
Debian packages that are missing and needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FOLDER_VARIABLE = "SPATIAL_SLURM_DIR"
NODES = ("node1", "node2")
DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", *NODES, "sshd")
"""In the order they start; stopping goes backwards."""

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "munged": "munge",
    "sshd": "openssh-server",
}
"""Program to the Debian package that brings it."""

_PORTS = range(20000, 30000)  # below the range that outgoing connections are given, so that none sits on a port of ours


def default_folder() -> Path:
    """The folder named by SPATIAL_SLURM_DIR, otherwise one under the system's temporary folder."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(tempfile.gettempdir()) / "spatial-slurm")


def program(name: str) -> str:
    """The absolute path of a program, /usr/sbin included even where PATH leaves it out."""
    found = shutil.which(name, path=SYSTEM_PATH)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed: apt-get install {PROGRAMS.get(name, name)}")
    return found


def missing_packages() -> list[str]:
    """The Debian packages still to be installed before a cluster can start."""
    return [package for name, package in PROGRAMS.items() if shutil.which(name, path=SYSTEM_PATH) is None]


@dataclass(frozen=True)
class Facts:
    """What is chosen once for a folder.

    first_job_id keeps the memory cgroups of two clusters on one machine apart, which are named by node and job id.
    """

    ports: dict[str, int]
    first_job_id: int
    database_password: str


@dataclass(frozen=True)
class Layout:
    """The folder of one cluster and what lies where in it."""

    root: Path

    @property
    def etc(self) -> Path:
        return self.root / "etc"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def database(self) -> Path:
        return self.root / "database"

    @property
    def munge(self) -> Path:
        return self.root / "munge"

    @property
    def ssh(self) -> Path:
        return self.root / "ssh"

    @property
    def scratch(self) -> Path:
        """Node-local scratch: SCRATCH/NODE/JOB is SLURM_TMPDIR inside a job and gone after it."""
        return self.root / "scratch"

    @property
    def work(self) -> Path:
        """The folder that login node and compute nodes share."""
        return self.root / "work"

    @property
    def conf(self) -> Path:
        return self.etc / "slurm.conf"

    def spool(self, node: str) -> Path:
        return self.root / f"spool-{node}"

    @cached_property
    def facts(self) -> Facts:
        """Read from the folder, or chosen and written when it has none yet."""
        path = self.root / "facts.json"
        if not path.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            chosen = {
                "ports": _free_ports(("slurmctld", "slurmdbd", "mariadbd", "sshd", *NODES)),
                "first_job_id": random.randrange(1, 6000) * 10_000,
                "database_password": secrets.token_hex(16),
            }
            path.touch(mode=0o600)
            path.write_text(json.dumps(chosen, indent=1))
        return Facts(**json.loads(path.read_text()))

    def port(self, daemon: str) -> int:
        return self.facts.ports[daemon]

    def make_folders(self) -> None:
        """Create every folder; those another user must pass through are open to read."""
        folders = (self.etc, self.run, self.log, self.munge, self.scratch, self.work)
        for folder in (self.root, *folders, self.state, self.ssh, *map(self.spool, NODES)):
            folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.root, *folders):
            folder.chmod(0o755)
        self.ssh.chmod(0o700)


def _free_ports(names: tuple[str, ...]) -> dict[str, int]:
    """A loopback port for each name, free at this moment."""
    held: dict[str, socket.socket] = {}
    for port in random.sample(_PORTS, len(_PORTS)):
        if len(held) == len(names):
            break
        listener = socket.socket()
        if listener.connect_ex(("127.0.0.1", port)) == 0:
            listener.close()
            continue
        listener.close()
        held[names[len(held)]] = listener = socket.socket()
        listener.bind(("127.0.0.1", port))
    ports = {name: listener.getsockname()[1] for name, listener in held.items()}
    for listener in held.values():
        listener.close()
    return ports


if __name__ == "__main__":
    sys.stdout.write(" ".join(missing_packages()) + "\n")
