"""Being asked to stop: a stage that keeps resumable pieces finishes the one in hand, any other ends at once.

A cluster sends SIGTERM some time before a job's limit, or when it wants the node back. A stage that keeps pieces says
so (`resumable`) and asks between two of them (`stop_here`), which raises `Interrupted`. Everywhere else the signal ends
the process as an exception, so that temporary files are removed, and so does a second signal while a piece is in hand.

Schedulers and launchers deliver one request several times (to every process of a step, and again from the launcher to
its children), so what follows within three seconds is the same request.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from spatial_core.errors import Interrupted

SAME_REQUEST_S = 3.0


@dataclass
class _Stop:
    """What this process was asked.

    Args:
        asked_at: time of the first request, None before it.
        resumable: nested blocks of work that finishes its piece first.
        leaving: the piece is finished and the process on its way out; nothing is gained by ending it harder.
    """

    asked_at: float | None = None
    resumable: int = 0
    leaving: bool = False


_stop = _Stop()


def obey_termination() -> None:
    """Answer SIGTERM as described above from now on. Call it in the main thread."""
    signal.signal(signal.SIGTERM, _on_termination)


def request_stop() -> None:
    """Ask this process to stop between two pieces."""
    if _stop.asked_at is None:
        _stop.asked_at = time.monotonic()


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    return _stop.asked_at is not None


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Work that calls `stop_here` between its pieces: the first SIGTERM inside only makes a note."""
    _stop.resumable += 1
    try:
        yield
    finally:
        _stop.resumable -= 1


def leaving() -> None:
    """The outcome is decided and only has to be told; SIGTERM means nothing any more, and SIGKILL needs no consent."""
    _stop.leaving = True


def stop_here(finished: str, *, asked: bool | None = None) -> None:
    """Stop if that was asked for.

    Args:
        finished: what a later run will find done, for the message.
        asked: whether to stop; default: whether this process was asked.

    Raises:
        Interrupted: if so.
    """
    if stop_requested() if asked is None else asked:
        leaving()
        raise Interrupted(f"stopped when asked to, {finished}; run again to go on from there")


def _on_termination(number: int, frame: FrameType | None) -> None:
    if _stop.leaving:
        return
    if _stop.resumable and (_stop.asked_at is None or time.monotonic() - _stop.asked_at < SAME_REQUEST_S):
        request_stop()
        return
    raise SystemExit(128 + number)
