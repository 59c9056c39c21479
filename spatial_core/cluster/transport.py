"""How requests reach the machine that has the scheduler's commands: on this host, or over one ssh connection.

Over ssh, all processes of one user on this machine share one master connection to a cluster; each request is a short
session on it, so nothing of ours stays on the login node. A request that fails because the connection was lost is
tried again with growing pauses: requests only look, or are safe to repeat (see `scheduler` for the one that is not).
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from spatial_core.config.settings import Settings
from spatial_core.errors import ClusterError, ClusterUnreachable

_SCRIPT = files("spatial_core.cluster").joinpath("beside_scheduler.py").read_text()
_TIMEOUT_S = 90
_CONNECTION_LOST = 255  # exit code by which ssh says that it failed itself
_SESSIONS = 4  # at a time; servers allow ten on one connection and refuse the next
_IDLE_S = 120  # after which an unused master connection closes itself; looks are at most half a minute apart
_NO_MASTER = "no master connection"


class NotConnected(ClusterUnreachable):
    """There was no connection, so that a request was certainly not sent."""


class Transport(Protocol):
    """A way to have a request answered beside the scheduler."""

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request.

        Raises:
            NotConnected: if it was not sent.
            ClusterUnreachable: if it may not have arrived, or its answer was lost.
            ClusterError: if the other side refused it.
        """
        ...


class ThisHost:
    """The scheduler's commands work on this machine."""

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return _answer([sys.executable, "-I", "-c", _SCRIPT], request)


@dataclass(frozen=True)
class Ssh:
    """A login node.

    Args:
        host, port, user: where; None for the user leaves it to ssh.
        key: private key file, None leaves it to ssh.
        known_hosts: host keys that are trusted; a host that is not in it is refused.
        jump_host: host on the way.
        attempts: times a request is tried when the connection is lost.
        pause: waits between them, seconds; replaced in tests.
    """

    host: str
    port: int = 22
    user: str | None = None
    key: Path | None = None
    known_hosts: Path | None = None
    jump_host: str | None = None
    attempts: int = 5
    pause: Callable[[float], None] = time.sleep

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request, again after a lost connection if that is safe."""
        remote = "exec python3 -I -c " + shlex.quote(_SCRIPT)
        for attempt in range(1, self.attempts + 1):
            try:
                self.connect()
                with self._session():
                    # Through the master or not at all: a connection of its own per request would be one per poll.
                    alone = ("-o", f"ProxyCommand=echo {_NO_MASTER} >&2")
                    return _answer([*self._command(*alone), self._place, remote], request)
            except ClusterUnreachable as error:
                safe = isinstance(error, NotConnected) or _repeatable(request)
                if attempt == self.attempts or not safe:
                    raise
                self.pause(min(30.0, 2.0**attempt) * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable")

    def connect(self) -> None:
        """Have a living master connection; the first of several processes makes it.

        Raises:
            ClusterError: if the host key is not known or the login is refused; says what to do.
            NotConnected: if there is no connection.
        """
        if self._alive():
            return
        if self.key is not None and not self.key.is_file():
            raise ClusterError(f"compute.ssh_key: there is no file {self.key}")
        with (self._folder / "connect.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._alive():
                return
            argv = [
                *self._command("-o", "ControlMaster=yes", "-o", f"ControlPersist={_IDLE_S}"),
                *self._way(),
                self._place,
                "true",
            ]
            # ssh goes on in the background and would hold an inherited pipe open.
            with tempfile.TemporaryFile() as said:
                try:
                    done = subprocess.run(
                        argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said, timeout=_TIMEOUT_S, check=False,
                        start_new_session=True,
                    )  # fmt: skip
                except subprocess.TimeoutExpired:
                    raise NotConnected(f"{self._place}: no ssh connection in {_TIMEOUT_S} s") from None
                said.seek(0)
                text = " ".join(said.read().decode(errors="replace").split())
            if done.returncode:
                raise self._refusal(text)

    def _refusal(self, text: str) -> ClusterError:
        where = self.known_hosts or "~/.ssh/known_hosts"
        if "REMOTE HOST IDENTIFICATION HAS CHANGED" in text:
            return ClusterError(
                f"{self._place}: its host key is another one than that in {where}; the host was set up anew, or "
                f"somebody stands in between: ask the cluster's administrators, then: ssh-keygen -f {where} -R "
                f"{shlex.quote(self._known_as)}"
            )
        if "Host key verification failed" in text:
            return ClusterError(
                f"{self._place}: its host key is not in {where}; compare the fingerprint with the one in the cluster's "
                f"documentation, then: ssh-keyscan -p {self.port} {self.host} >> {where}"
            )
        if "Permission denied" in text:
            return ClusterError(f"{self._place}: login refused ({text}); check compute.ssh_user and compute.ssh_key")
        return NotConnected(f"{self._place}: no ssh connection ({text})")

    def _alive(self) -> bool:
        return self._tell_master("check") == 0

    def close(self) -> None:
        """End the master connection, if there is one; requests of other processes make a new one."""
        self._tell_master("exit")

    def _tell_master(self, what: str) -> int:
        argv = [*self._command(), "-O", what, self._place]
        try:
            done = subprocess.run(argv, capture_output=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise NotConnected(f"{self._place}: the ssh connection does not react in {_TIMEOUT_S} s") from None
        return done.returncode

    @property
    def _place(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host

    @property
    def _known_as(self) -> str:
        """The host's name in a file of known hosts."""
        return self.host if self.port == 22 else f"[{self.host}]:{self.port}"

    @property
    def _folder(self) -> Path:
        """Sockets and locks of this connection; the path of a socket may have about 100 characters."""
        identity = f"{self._place}:{self.port}:{self.key}:{self.known_hosts}:{self.jump_host}"
        name = f"spatial-ssh-{getpass.getuser()}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / name
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise ClusterError(f"{folder} belongs to somebody else; remove it or set XDG_RUNTIME_DIR")
        return folder

    def _command(self, *options: str) -> list[str]:
        socket = f"ControlPath={self._folder / 'master'}".replace("%", "%%")
        return ["ssh", "-T", "-p", str(self.port), "-o", socket, *self._manners(), *options]

    def _way(self) -> list[str]:
        """The way to the login node: through a jump host, which is met with the same key and the same strictness."""
        if self.jump_host is None:
            return []
        place, _, port = self.jump_host.partition(":")
        manners = [word.replace("%", "%%") for word in self._manners()]
        jump = shlex.join(["ssh", "-T", "-p", port or "22", "-o", "ControlPath=none", *manners, "-W", "%h:%p", place])
        return ["-o", f"ProxyCommand={jump}"]

    def _manners(self) -> list[str]:
        """Options of every connection."""
        argv = []
        settings = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "ConnectTimeout": "20",
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "3",
            "LogLevel": "ERROR",
        }
        if self.known_hosts:
            settings["UserKnownHostsFile"] = _literal(self.known_hosts)
        if self.key:
            settings["IdentitiesOnly"] = "yes"
            settings["IdentityFile"] = _literal(self.key)
        for name, value in settings.items():
            argv += ["-o", f"{name}={value}"]
        return argv

    @contextmanager
    def _session(self) -> Iterator[None]:
        """One of the sessions that all processes together may have open."""
        slots = [(self._folder / f"session{number}.lock").open("w") for number in range(_SESSIONS)]
        try:
            while True:
                for slot in slots:
                    try:
                        fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    yield
                    return
                self.pause(0.05)
        finally:
            for slot in slots:
                slot.close()


def _literal(path: Path) -> str:
    """A path for an option of ssh, which splits at blanks and replaces what stands behind a percent sign."""
    return '"' + str(path).replace("%", "%%") + '"'


def transport_for(settings: Settings) -> Transport:
    """The transport that the settings ask for."""
    compute = settings.compute
    if compute.profile != "slurm_ssh":
        return ThisHost()
    assert compute.ssh_host is not None  # noqa: S101 - the settings model refuses the profile without it
    return Ssh(
        compute.ssh_host,
        compute.ssh_port,
        compute.ssh_user,
        compute.ssh_key and settings.absolute(compute.ssh_key),
        compute.ssh_known_hosts and settings.absolute(compute.ssh_known_hosts),
        compute.ssh_jump_host,
    )


def _answer(argv: list[str], request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        done = subprocess.run(
            argv, input=json.dumps(request).encode(), capture_output=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ClusterUnreachable(f"{argv[0]}: no answer to {request['do']!r} in {_TIMEOUT_S} s") from None
    said = " ".join(done.stderr.decode(errors="replace").split())[-500:]
    if done.returncode == _CONNECTION_LOST:
        kind = NotConnected if _NO_MASTER in said else ClusterUnreachable
        raise kind(f"ssh connection lost during {request['do']!r} ({said})")
    if done.returncode:
        raise ClusterError(f"request {request['do']!r} failed beside the scheduler: {said or done.returncode}")
    # One line; what a login shell prints before it is not ours.
    last = done.stdout.strip().rpartition(b"\n")[2]
    try:
        answer: dict[str, Any] = json.loads(last)
    except ValueError:
        raise ClusterError(f"request {request['do']!r} was answered with {last[:200]!r} beside the scheduler") from None
    return answer


def _repeatable(request: Mapping[str, Any]) -> bool:
    """A submission whose answer was lost may have happened: asking again would submit twice."""
    return bool(request["do"] != "submit")
