"""A stage in a process of its own, reporting to the Dagster run that started it through Pipes.

What crosses: progress and log lines as Pipes log messages, and at the end one custom message, either
`{"report": {...}}` or `{"failure": {"type": "TarError", "message": "..."}}`. Raw output goes where the process's own
stdout and stderr go.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, PipesContext, open_dagster_pipes

from spatial_core import errors
from spatial_core.errors import SpatialError, StageFailed
from spatial_core.jobs.pacing import PacedProgress
from spatial_core.jobs.registry import StageCall, run_stage

_GRACE_S = 10.0


class _PipesHandler(logging.Handler):
    """Forwards log records to the Dagster run."""

    def __init__(self, pipes: PipesContext) -> None:
        super().__init__(logging.INFO)
        self._pipes = pipes

    def emit(self, record: logging.LogRecord) -> None:
        if not self._pipes.is_closed:
            self._pipes.log.log(record.levelno, record.getMessage())


def started_by_dagster() -> bool:
    """Whether this process finds a Pipes session in its environment."""
    return DAGSTER_PIPES_CONTEXT_ENV_VAR in os.environ


def run_reporting(call: StageCall) -> int:
    """Run a stage and report its outcome over Pipes; returns the exit code (1 for an expected failure)."""
    with open_dagster_pipes() as pipes:
        handler = _PipesHandler(pipes)
        logger = logging.getLogger("spatial_core")
        logger.addHandler(handler)
        try:
            report = run_stage(call, PacedProgress(pipes.log.info))
        except SpatialError as error:
            pipes.report_custom_message({"failure": failure_record(error)})
            return 1
        finally:
            logger.removeHandler(handler)
        pipes.report_custom_message({"report": report.to_json()})
    return 0


def failure_record(error: SpatialError) -> dict[str, str]:
    """A failure as JSON, from which `failure_from` restores the same type and message."""
    return {"type": type(error).__name__, "message": " ".join(str(error).split())}


def failure_from(record: dict[str, Any]) -> SpatialError:
    """Inverse of `failure_record`; a type this version does not know becomes `StageFailed`, naming it."""
    kind = getattr(errors, str(record["type"]), None)
    if isinstance(kind, type) and issubclass(kind, SpatialError):
        return kind(record["message"])
    return StageFailed(f"{record['type']}: {record['message']}")


def end_cleanly_on_termination() -> None:
    """Turn SIGTERM into SystemExit, so that a stage removes its temporary files."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def end_with_parent() -> None:
    """End this process when its standard input closes: the parent holds the other end and never writes.

    A parent that is killed outright can tell its child nothing, but the kernel closes its files. What has not ended
    after a grace period is ended, with everything it started if it leads a process group.
    """

    def wait_for_parent() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            continue
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(_GRACE_S)
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait_for_parent, name="parent-watch", daemon=True).start()
