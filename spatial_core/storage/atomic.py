"""Writing so that a reader, or a rerun after `kill -9`, never sees half an artifact.

Everything is written under a temporary name beside its destination and renamed once complete and flushed. The names
start with a dot, so globs, DuckDB and pyarrow datasets pass over them. A job that uses node-local scratch writes there
first and copies the complete file to that temporary name, so that it appears in the same one step, with the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spatial_core.errors import ArtifactBusy
from spatial_core.storage.scratch import naming_a_full_disk, working_path

_MARK = ".partial"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_MARK}")


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: Path, *, scratch: bool = True) -> Iterator[Path]:
    """Yield a temporary path; on success it is flushed and replaces `path`, on any error it is removed.

    Args:
        path: where the file is to appear.
        scratch: whether the temporary path may lie in node-local scratch; not worth it for a few kilobytes.

    Raises:
        StorageFull: if there is no space left in scratch or beside `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    work = working_path(temporary) if scratch else temporary
    try:
        with naming_a_full_disk(work.parent, path.name):
            yield work
        with naming_a_full_disk(path.parent, path.name):
            if work != temporary:
                shutil.copyfile(work, temporary)
            _sync_file(temporary)
        temporary.replace(path)
        _sync_directory(path.parent)
    finally:
        for left in {work, temporary}:
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it takes the place of `path`, the old content being removed afterwards.

    POSIX cannot swap two full folders in one step without `renameat2`, so between two renames `path` is absent for an
    instant; a process killed there leaves the previous folder under a dotted name and the stage is simply rerun.

    Raises:
        StorageFull: if there is no space left in scratch or beside `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    work = working_path(temporary)
    work.mkdir()
    try:
        with naming_a_full_disk(work.parent, path.name):
            yield work
        with naming_a_full_disk(path.parent, path.name):
            if work != temporary:
                shutil.copytree(work, temporary, symlinks=True, copy_function=shutil.copyfile)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync_file(file)
        retired = _temporary(path)
        if path.exists():
            path.replace(retired)
        temporary.replace(path)
        _sync_directory(path.parent)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        for left in {work, temporary}:
            shutil.rmtree(left, ignore_errors=True)


def write_json(path: Path, record: Any) -> None:
    """Write `record` as sorted, indented JSON, atomically."""
    with atomic_file(path, scratch=False) as temporary:
        temporary.write_text(json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n")


def in_other_hands(path: Path) -> bool:
    """Whether another process holds the writer's lock of an artifact now."""
    try:
        handle = _lock_of(path).open("r")
    except FileNotFoundError:
        return False
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def busy(path: Path) -> ArtifactBusy:
    """The error of an artifact in other hands."""
    return ArtifactBusy(f"{path}: another process is writing it; let that finish, then run again")


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the writer's lock of an artifact; also sweeps what killed writers of the same artifact left behind.

    The lock belongs to the process, so one that dies never blocks the next.

    Raises:
        ArtifactBusy: at once, if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock_of(path).open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy(path) from None
        for leftover in path.parent.glob(f".{path.name}.*{_MARK}"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
        yield
