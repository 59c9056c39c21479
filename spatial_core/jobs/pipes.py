"""A stage in a process of its own, reporting to the Dagster run that started it through Pipes.

What crosses: progress and log lines as Pipes log messages; at the end two custom messages, first `{"usage": {...}}`
(see `usage`), then one of `{"report": {...}}`, `{"failure": {"type": "TarError", "message": "..."}}` and
`{"interrupted": {"type": "Interrupted", "message": "..."}}`. Raw output goes where the process's own stdout and stderr
go.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, PipesContext, open_dagster_pipes

from spatial_core import errors
from spatial_core.errors import Interrupted, SpatialError, StageFailed
from spatial_core.interruption import leaving
from spatial_core.jobs.message_file import LineFileWriter
from spatial_core.jobs.pacing import PacedProgress
from spatial_core.jobs.usage import UsageMeter
from spatial_core.report import Progress, Report

EXIT_FAILED = 1
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: try again later
# From the request to end, to the end: half of it for the piece in hand, half for removing temporary files.
GRACE_S = 10.0


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


def run_reporting(work: Callable[[Progress], Report]) -> int:
    """Run a stage and report its outcome over Pipes; returns the exit code.

    Args:
        work: runs the stage.
    """
    with open_dagster_pipes(message_writer=LineFileWriter()) as pipes:
        handler = _PipesHandler(pipes)
        logger = logging.getLogger("spatial_core")
        logger.addHandler(handler)
        code, outcome = 0, {}
        try:
            with UsageMeter() as usage:
                try:
                    outcome = {"report": work(PacedProgress(pipes.log.info)).to_json()}
                except Interrupted as error:
                    code, outcome = EXIT_INTERRUPTED, {"interrupted": failure_record(error)}
                except SpatialError as error:
                    code, outcome = EXIT_FAILED, {"failure": failure_record(error)}
                finally:
                    leaving()
        finally:
            logger.removeHandler(handler)
            pipes.report_custom_message({"usage": usage.record()})
        pipes.report_custom_message(outcome)
    return code


def failure_record(error: SpatialError) -> dict[str, str]:
    """A failure as JSON, from which `failure_from` restores the same type and message."""
    return {"type": type(error).__name__, "message": " ".join(str(error).split())}


def failure_from(record: dict[str, Any]) -> SpatialError:
    """Inverse of `failure_record`; a type this version does not know becomes `StageFailed`, naming it."""
    kind = getattr(errors, str(record["type"]), None)
    if isinstance(kind, type) and issubclass(kind, SpatialError):
        return kind(record["message"])
    return StageFailed(f"{record['type']}: {record['message']}")


def end_with_parent() -> None:
    """End this process when its standard input closes: the parent holds the other end and never writes.

    A parent that is killed outright can tell its child nothing, but the kernel closes its files. What has not ended
    after a grace period is ended, with everything it started if it leads a process group.
    """

    def wait_for_parent() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            continue
        for _ in range(2):  # the first lets a resumable stage finish its piece, the second ends it
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(GRACE_S / 2)
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait_for_parent, name="parent-watch", daemon=True).start()
