"""Waiting for an artifact that another process is writing, instead of failing because two came at the same time.

`make demo` beside `make dev`, or a person at the command line beside the daemon: both may reach for one artifact. The
second finds it made once it has waited, because a stage keeps what is up to date.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from spatial_assets.compute.base import Outcome, Work
from spatial_core.errors import ArtifactBusy

_PATIENCE_S = 3_600.0
_PAUSE_S = 5.0
# A call may be a job on a cluster; asking its queue every few seconds for an hour would be no way to wait.
_LONGEST_PAUSE_S = 60.0


def outlasting_others(
    run_all: Callable[[Work], Iterator[Outcome]],
    work: Work,
    tell: Callable[[str], None],
    *,
    patience_s: float = _PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Outcome]:
    """Outcomes of stage calls; one whose artifact somebody else is writing is called again after a pause.

    Args:
        run_all: runs calls.
        work: the calls.
        tell: shown once a key what is waited for.
        patience_s: seconds after which waiting is given up; the outcome is then `ArtifactBusy`.
        clock: seconds, monotonic.

    Yields:
        One outcome for each key, those waited for last.
    """
    deadline = clock() + patience_s
    told: set[str] = set()
    pause = _PAUSE_S
    while work.calls:
        busy: list[str] = []
        for outcome in run_all(work):
            if not isinstance(outcome.error, ArtifactBusy) or clock() >= deadline:
                yield outcome
                continue
            busy.append(outcome.key)
            if outcome.key not in told:
                told.add(outcome.key)
                tell(f"waiting: {outcome.error}")
        if busy:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        work = replace(work, calls={key: work.calls[key] for key in busy})
