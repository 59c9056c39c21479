"""SHA-256 of a tar, taken close behind the walk that reads it, so that a tar larger than memory is read from disk once.

Left alone, hashing runs ten times faster than decoding: it would be through with an 18 GB tar long before the images
are decoded, and the pages would have to be fetched a second time.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from spatial_core.errors import TarError

_STEP_BYTES: Final = 8 << 20
_READ_BYTES: Final = 1 << 20
_MAX_STEPS_WAITING: Final = 4


class FollowingDigest:
    """Hashes an open file in its own thread, never beyond the position it was told of.

    Args:
        fd: the file; its position is neither used nor moved.
        path: its name, for messages.
        size: its size in bytes when it was opened.
    """

    def __init__(self, fd: int, path: Path, size: int) -> None:
        self._fd = fd
        self._path = path
        self._size = size
        self._hash = hashlib.sha256()
        self._asked = 0
        self._steps: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tar-digest")

    def follow(self, position: int) -> None:
        """Let the digest come up to `position`; returns at once unless it lags far behind.

        Raises:
            TarError: if the file turned out to be shorter.
        """
        while position - self._asked >= _STEP_BYTES:
            self._ask(self._asked + _STEP_BYTES)

    def hexdigest(self) -> str:
        """Hash the rest of the file and return the digest of all of it.

        Raises:
            TarError: if the file turned out to be shorter.
        """
        self.follow(self._size)
        self._ask(self._size)
        while self._steps:
            self._steps.popleft().result()
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _ask(self, position: int) -> None:
        self._steps.append(self._thread.submit(self._update, self._asked, position))
        self._asked = position
        while len(self._steps) > _MAX_STEPS_WAITING:
            self._steps.popleft().result()

    def _update(self, start: int, end: int) -> None:
        while start < end:
            chunk = os.pread(self._fd, min(_READ_BYTES, end - start), start)
            if not chunk:
                raise TarError(
                    f"{self._path}: byte {start}: the file ends here but had {self._size} bytes when it was opened"
                )
            self._hash.update(chunk)
            start += len(chunk)
