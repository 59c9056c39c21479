"""Image bytes of a tar, read later by the offset and digest that ingest recorded. The tar is not parsed again.

Bytes are copied out with `pread` rather than mapped: the copy is about 1 % of decoding the image, nothing stays
resident behind the reader however large the tar, and a tar that is cut while it is being read gives a typed error
where a mapping would end the whole process with SIGBUS.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from spatial_core.errors import DigestMismatch, InputError, TarError


class TarImages:
    """An open tar, read at offsets; any number of threads may share one.

    Args:
        path: the tar that the offsets were recorded from.

    Raises:
        InputError: if the tar is missing or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"{path}: cannot be opened ({error.strerror})") from error
        self.size = os.fstat(self._fd).st_size

    def view(self, offset: int, length: int) -> memoryview:
        """The `length` bytes at `offset`, as a read-only memoryview of format "B".

        Raises:
            TarError: if they do not all lie inside the tar.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise TarError(
                f"{self.path}: byte {offset}: {length} bytes of an image were recorded here, but the tar has "
                f"{self.size} bytes; it is not the tar that was ingested, rebuild its intermediates"
            )
        data = os.pread(self._fd, length, offset)
        if len(data) != length:
            data = self._read_rest(data, offset, length)
        return memoryview(data)

    def verified(self, offset: int, length: int, sha256: str) -> memoryview:
        """As `view`, after comparing the bytes with the hex digest that ingest recorded for them.

        Raises:
            TarError: as `view`.
            DigestMismatch: if a byte differs; names the tar, the offset and what to rebuild.
        """
        data = self.view(offset, length)
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise DigestMismatch(
                f"{self.path}: byte {offset}: the image of {length} bytes here changed since it was ingested "
                f"(recorded sha256 {sha256[:12]}, found {found[:12]}); restore the tar, or rebuild the intermediates "
                f"of {self.path.name}"
            )
        return data

    def close(self) -> None:
        """Close the tar; views taken before stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_rest(self, data: bytes, offset: int, length: int) -> bytes:
        """A read may stop early (at 2 GiB, on a signal); only end of file means that bytes are gone."""
        pieces = [data]
        done = len(data)
        while done < length:
            piece = os.pread(self._fd, length - done, offset + done)
            if not piece:
                raise TarError(
                    f"{self.path}: byte {offset + done}: the tar ends here but had {self.size} bytes when it was "
                    "opened; it is being changed"
                )
            pieces.append(piece)
            done += len(piece)
        return b"".join(pieces)
