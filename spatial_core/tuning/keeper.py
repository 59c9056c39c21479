"""`python -m spatial_core.tuning.keeper FOLDER DATA USER POSTGRES ...`: runs a PostgreSQL as long as somebody uses it.

Whoever uses the server holds a shared lock on FOLDER/.users.lock. The keeper waits for an exclusive one, and gets it
when the last user is gone, in whatever way it went: the kernel releases the locks of the dead. It then stops the
server, and ends with the lock still in its hand, so that a new user waits until the server is down before starting
another. A server that dies meanwhile is started again; one whose keeper is killed is ended by the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pwd
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import Any

USERS_LOCK = ".users.lock"
LOG = "postgres.log"
_PR_SET_PDEATHSIG = 1
# A server that ends this often in a row without having lasted is not started again.
_FAILURES = 5
_LASTING_S = 5.0
_STOP_S = 60.0


@contextlib.contextmanager
def as_server_user(data: Path, user: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """How a program of PostgreSQL is run on a data folder: its `-D`, and options of `Popen`.

    Args:
        data: the data folder, owned by `user`.
        user: whom to become, when this process is root; None = nobody else. Such a user often cannot enter the folders
            above, so it is given the folder itself, opened.
    """
    if user is None:
        yield str(data), {"cwd": "/"}
        return
    descriptor = os.open(data, os.O_RDONLY | os.O_DIRECTORY)
    try:
        become = {"user": user, "group": pwd.getpwuid(user).pw_gid, "extra_groups": []}
        yield f"/proc/self/fd/{descriptor}", {"cwd": "/", "pass_fds": (descriptor,), **become}
    finally:
        os.close(descriptor)


def keep(folder: Path, data: Path, user: int | None, command: list[str]) -> int:
    """Run the server until nobody uses it; returns the exit code of the keeper."""
    unused = threading.Event()
    threading.Thread(target=_wait_until_unused, args=(folder / USERS_LOCK, unused), daemon=True).start()
    failures = 0
    while failures < _FAILURES:
        started = time.monotonic()
        with (folder / LOG).open("ab") as log, as_server_user(data, user) as (place, options):
            server = Popen(
                [*command, "-D", place],
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_end_with_keeper,  # noqa: PLW1509 - the only other thread waits in a system call
                **options,
            )
        while server.poll() is None and not unused.wait(0.1):
            continue
        if unused.is_set():
            return _stop(server)
        failures = 0 if time.monotonic() - started > _LASTING_S else failures + 1
        time.sleep(1.0)
    return 1


def _wait_until_unused(path: Path, unused: threading.Event) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # never closed: see the module's docstring
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    unused.set()


def _stop(server: Popen[bytes]) -> int:
    """Fast shutdown: ends sessions, writes everything out."""
    server.send_signal(signal.SIGINT)
    try:
        server.wait(_STOP_S)
    except TimeoutExpired:
        server.kill()
    return 0


def _end_with_keeper() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


if __name__ == "__main__":
    own_folder, data_folder, user_id, *postgres = sys.argv[1:]
    sys.exit(keep(Path(own_folder), Path(data_folder), int(user_id) if user_id else None, postgres))
