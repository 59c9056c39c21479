"""Progress of a stage as log lines, few enough for an event log that keeps each one as a database row."""

from __future__ import annotations

import time
from collections.abc import Callable


class PacedProgress:
    """A `Progress` that emits its first call, its last, and otherwise at most one line every `every_s` seconds."""

    def __init__(
        self, emit: Callable[[str], None], *, every_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._emit = emit
        self._every_s = every_s
        self._clock = clock
        self._last: tuple[float, str] | None = None

    def __call__(self, done: int, total: int | None, message: str) -> None:
        now = self._clock()
        due = self._last is None or now - self._last[0] >= self._every_s
        if not (due or (total is not None and done >= total)):
            return
        line = f"{message}: {done:,}" if total is None else f"{message}: {done:,} of {total:,}"
        if self._last is None or line != self._last[1]:
            self._emit(line)
            self._last = (now, line)
