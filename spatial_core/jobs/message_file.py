"""Pipes messages as whole lines of a file that a reader follows while it grows.

Each message is one append of a complete line. A job that is queued again goes on in the same file; where the attempt
before it was killed within a line, that half is ended first, so that it spoils no other.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dagster_pipes import PipesDefaultMessageWriter, PipesMessage, PipesMessageWriterChannel, PipesParams


class LineFile(PipesMessageWriterChannel):
    """A message channel into a file.

    Args:
        path: the file; made if absent.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        if _ends_within_a_line(path):
            self._append(b"\n")

    def write_message(self, message: PipesMessage) -> None:
        """Append one message; it is there for other machines when this returns."""
        self._append(json.dumps(message).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        # Opened each time: a network file system shows others what was written once the file is closed.
        with self._lock:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                left = memoryview(line)
                while left:  # a full line in one go, unless the system takes less
                    left = left[os.write(file, left) :]
            finally:
                os.close(file)


class LineFileWriter(PipesDefaultMessageWriter):
    """The usual message writer, except that it writes a file through `LineFile`."""

    @contextmanager
    def open(self, params: PipesParams) -> Iterator[PipesMessageWriterChannel]:
        with super().open(params) as channel:
            path: Any = params.get(self.FILE_PATH_KEY)
            yield channel if path is None else LineFile(Path(path))


def _ends_within_a_line(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False
