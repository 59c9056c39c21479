"""Halves of pairs that wait for their partner, in bounded memory however far apart the tar holds the two.

Up to a limit they wait in memory, which is all that happens with tars that hold image and text side by side. Beyond it
they move to a SQLite file, so that a tar with all images before all texts works as well.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from spatial_core.errors import ArtifactError

_IN_MEMORY: Final = 1 << 17
_PRAGMAS: Final = ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "cache_size=-16384")


class WaitingHalves:
    """A map from a key to the packed form of a half.

    Args:
        overflow: where the SQLite file may be made; it is removed at the end.
        limit: halves kept in memory.
    """

    def __init__(self, overflow: Path, limit: int = _IN_MEMORY) -> None:
        self._overflow = overflow
        self._limit = limit
        self._memory: dict[bytes, tuple[int, bytes]] = {}
        self._file: sqlite3.Connection | None = None

    def add(self, key: bytes, offset: int, packed: bytes) -> None:
        """Let a half wait; no other waits under its key.

        Args:
            key: what its partner will ask for.
            offset: of its member in the tar.
            packed: what is handed back.

        Raises:
            ArtifactError: if the overflow file cannot be written.
        """
        self._memory[key] = (offset, packed)
        if len(self._memory) > self._limit:
            self._move_to_file()

    def pop(self, key: bytes) -> bytes | None:
        """Take out the half that waits under `key`, if one does."""
        found = self._memory.pop(key, None)
        if found is not None:
            return found[1]
        if self._file is None:
            return None
        row = self._file.execute("SELECT packed FROM halves WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        self._file.execute("DELETE FROM halves WHERE key = ?", (key,))
        return bytes(row[0])

    def remaining(self) -> Iterator[bytes]:
        """Every half that still waits, by offset."""
        if self._file is None:
            for _, packed in sorted(self._memory.values()):
                yield packed
            return
        self._move_to_file()
        for (packed,) in self._file.execute("SELECT packed FROM halves ORDER BY offset"):
            yield bytes(packed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._overflow.unlink(missing_ok=True)

    def _move_to_file(self) -> None:
        try:
            if self._file is None:
                self._file = self._create()
            halves = ((key, offset, packed) for key, (offset, packed) in sorted(self._memory.items()))
            self._file.execute("BEGIN")
            self._file.executemany("INSERT INTO halves VALUES (?, ?, ?)", halves)
            self._file.execute("COMMIT")
        except sqlite3.Error as error:
            raise ArtifactError(f"{self._overflow}: cannot be written ({error})") from error
        self._memory = {}

    def _create(self) -> sqlite3.Connection:
        self._overflow.unlink(missing_ok=True)
        file = sqlite3.connect(self._overflow, isolation_level=None)
        for pragma in _PRAGMAS:
            file.execute(f"PRAGMA {pragma}")
        file.execute("CREATE TABLE halves (key BLOB PRIMARY KEY, offset INTEGER, packed BLOB) WITHOUT ROWID")
        return file
