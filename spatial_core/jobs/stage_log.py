"""Log files for people who set `global.log_dir`: one a stage, whichever way it is run.

Several processes may append to one file, each line with its host and process; nothing is ever truncated.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spatial_core.errors import SpatialError
from spatial_core.jobs.pacing import PacedProgress
from spatial_core.report import Progress, Report

_LOG = logging.getLogger(__name__)
_LIBRARY = "spatial_core"


def logged(folder: Path | None, stage: str, work: Callable[[Progress], Report], progress: Progress) -> Report:
    """Run a stage, and keep its log lines, some of its progress and its outcome in `<folder>/<stage>.log`.

    A folder that cannot be written is warned of and does not stop the work.

    Args:
        folder: where logs go; None keeps none.
        stage: its name.
        work: runs it, given a `Progress`.
        progress: told of every step.

    Raises:
        SpatialError: what the stage raised.
    """
    handler = None if folder is None else _open(folder / f"{stage}.log")
    if handler is None:
        return work(progress)
    with _attached(handler) as log:
        paced = PacedProgress(log.info)

        def both(done: int, total: int | None, message: str) -> None:
            paced(done, total, message)
            progress(done, total, message)

        log.info("%s: begins", stage)
        try:
            report = work(both)
        except SpatialError as error:
            log.error("%s: %s: %s", stage, type(error).__name__, " ".join(str(error).split()))  # noqa: TRY400 one line
            raise
        outcome = "was up to date" if report.up_to_date else f"{report.rows} rows in {report.seconds:.1f} s"
        log.info("%s: %s (%s)", stage, outcome, report.artifact)
    return report


def _open(path: Path) -> logging.Handler | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        _LOG.warning("global.log_dir: %s cannot be written (%s); no log file is kept", path, error.strerror)
        return None
    origin = f"{socket.gethostname()} {os.getpid()}"
    handler.setFormatter(logging.Formatter(f"%(asctime)s {origin} %(levelname)s %(message)s"))
    return handler


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[logging.Logger]:
    """A logger of the file alone; the library's own log lines go there as well."""
    library = logging.getLogger(_LIBRARY)
    level = library.level
    library.addHandler(handler)
    if library.getEffectiveLevel() > logging.INFO:
        library.setLevel(logging.INFO)
    log = logging.Logger(_LIBRARY, logging.INFO)
    log.addHandler(handler)
    try:
        yield log
    finally:
        library.removeHandler(handler)
        library.setLevel(level)
        handler.close()
