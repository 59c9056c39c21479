"""Node-local scratch: where artifacts are written before they are published, when a job was told of such a folder.

A cluster's shared file system is slow at many small writes; a node's own disk is not. What is published, and how, stays
the same: see `atomic`. Each job has a folder of its own in the scratch folder and holds a lock in it, so that the next
job on the node can tell what a killed one left behind, and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from spatial_core.errors import ConfigError, StorageFull

_PREFIX = "spatial-"
_LOCK = ".lock"
_current: Path | None = None


def scratch_folder() -> Path | None:
    """This job's folder for unpublished files, or None when they are written beside their destination."""
    return _current


def working_path(beside: Path) -> Path:
    """Where to write a file that would otherwise lie at `beside`, whose name must be its own."""
    return beside if _current is None or _within_scratch(beside) else _current / beside.name


@contextlib.contextmanager
def local_scratch(expression: str | None) -> Iterator[None]:
    """Use scratch for the length of the block.

    Args:
        expression: an existing folder; `$NAME` stands for a variable of the environment. None: no scratch is used.

    Raises:
        ConfigError: if a variable is not set or the folder is not there or cannot be written in; names it and the node.
    """
    global _current  # noqa: PLW0603 - one process, one job
    if expression is None:
        yield
        return
    folder = Path(os.path.expandvars(expression))
    where = f"scratch folder {expression}" + ("" if str(folder) == expression else f" ({folder})")
    node = socket.gethostname()
    if "$" in str(folder):
        raise ConfigError(f"{where}: a variable in it is not set on {node}; name a folder that every node has")
    if not folder.is_absolute() or not folder.is_dir():
        raise ConfigError(f"{where}: no such folder on {node}")
    own = folder / f"{_PREFIX}{os.environ.get('SLURM_JOB_ID', 'local')}-{uuid.uuid4().hex[:8]}"
    try:
        own.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(f"{where}: cannot be written in on {node} ({error.strerror})") from error
    before = _current
    unnamed = own / f"{_LOCK}.new"  # takes its name locked, so that nobody finds it free before that
    with unnamed.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unnamed.rename(own / _LOCK)
        _sweep(folder, own)
        _current = own
        try:
            yield
        finally:
            _current = before
            shutil.rmtree(own, ignore_errors=True)


@contextlib.contextmanager
def naming_a_full_disk(folder: Path, name: str) -> Iterator[None]:
    """Turn the system's "no space left" into an error that says where.

    Args:
        folder: that is written in.
        name: of what is written.

    Raises:
        StorageFull: for a full disk or an exhausted quota.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        where = f"scratch folder {_current}" if _within_scratch(folder / name) else str(folder)
        raise StorageFull(
            f"{where}: no space left for {name} on {socket.gethostname()}; make room or use another folder"
        ) from error


def _within_scratch(path: Path) -> bool:
    return _current is not None and _current in path.parents


def _sweep(folder: Path, own: Path) -> None:
    """Remove what jobs of this user left whose lock nobody holds any more."""
    for left in folder.glob(f"{_PREFIX}*"):
        try:
            if left == own or left.stat().st_uid != os.getuid():
                continue
            with (left / _LOCK).open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        except OSError:  # another job's, which is at work, has just begun or is just removing it itself
            continue
