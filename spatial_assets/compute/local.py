"""Stages on this machine: in the process of the Dagster run, or in a child process that reports through Pipes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import IO

import dagster as dg

from spatial_assets.compute.base import Outcome, Work
from spatial_core.errors import SpatialError, StageFailed
from spatial_core.jobs.pacing import PacedProgress
from spatial_core.jobs.pipes import GRACE_S, failure_from
from spatial_core.jobs.registry import StageCall, run_stage, sharing_cores
from spatial_core.report import Progress, Report, silent

_POLL_S = 0.2
_TAIL_LINES = 5


class InProcess:
    """In the Dagster run's own process: nothing to start, nothing to isolate.

    Args:
        also: told of every step of progress, besides the paced log lines.
    """

    def __init__(self, also: Progress = silent) -> None:
        self._also = also

    def run_all(self, context: dg.AssetExecutionContext, work: Work) -> Iterator[Outcome]:
        return one_after_another(lambda call: self.run(context, call), work)

    def run(self, context: dg.AssetExecutionContext, call: StageCall) -> Report:
        """Run one stage to its end; raises what it raises."""
        paced = PacedProgress(context.log.info)

        def progress(done: int, total: int | None, message: str) -> None:
            paced(done, total, message)
            self._also(done, total, message)

        with _forwarded_logs(context):
            return run_stage(call, progress)


class ChildProcess:
    """In a child process that reports through Pipes: its memory is its own and it can be killed alone."""

    def run_all(self, context: dg.AssetExecutionContext, work: Work) -> Iterator[Outcome]:
        if not work.side_by_side:
            return one_after_another(lambda call: self.run(context, call), work)
        stop = threading.Event()
        count = len(work.calls)
        return _side_by_side(lambda call: self.run(context, sharing_cores(call, count), stop), work, stop)

    def run(self, context: dg.AssetExecutionContext, call: StageCall, stop: threading.Event | None = None) -> Report:
        """Run one stage to its end; raises what it raises, or `StageFailed` when it ended without saying why."""
        with (
            tempfile.TemporaryDirectory(prefix="spatial-call-") as folder,
            dg.open_pipes_session(
                context=context,
                context_injector=dg.PipesTempFileContextInjector(),
                message_reader=dg.PipesTempFileMessageReader(),
            ) as session,
        ):
            file = Path(folder) / "call.json"
            file.write_text(call.to_json())
            environment = {**os.environ, **session.get_bootstrap_env_vars(), "PYTHONUNBUFFERED": "1"}
            command = [sys.executable, "-m", "spatial_core.jobs", call.stage, "--call", str(file)]
            code, tail = _run_child([*command, "--until-stdin-closes"], environment, stop)
        # Messages are complete only after the session has closed.
        for message in session.get_custom_messages():
            if "report" in message:
                return Report.from_json(message["report"])
            for kind in ("failure", "interrupted"):
                if kind in message:
                    raise failure_from(message[kind])
        raise StageFailed(
            f"stage {call.stage} {_how_it_ended(code)} without its artifact; last lines: {tail or 'none'}"
        )


def one_after_another(run: Callable[[StageCall], Report], work: Work) -> Iterator[Outcome]:
    """Outcomes of calls that each use the whole machine."""
    for key, call in work.calls.items():
        yield _outcome(run, key, call)


def _side_by_side(run: Callable[[StageCall], Report], work: Work, stop: threading.Event) -> Iterator[Outcome]:
    """Outcomes of calls that run at the same time, as they end; `stop` is set when nobody waits for them any more."""
    with ThreadPoolExecutor(max(1, len(work.calls))) as pool:
        try:
            running = [pool.submit(_outcome, run, key, call) for key, call in work.calls.items()]
            for ended in as_completed(running):
                yield ended.result()
        finally:
            stop.set()


def _outcome(run: Callable[[StageCall], Report], key: str, call: StageCall) -> Outcome:
    try:
        return Outcome(key, report=run(call))
    except SpatialError as error:
        return Outcome(key, error=error)


def _run_child(command: list[str], environment: dict[str, str], stop: threading.Event | None) -> tuple[int, str]:
    """Run a command to its end; returns its exit code (negative: the signal) and its last lines on stderr.

    A process that is waited for from another thread than the main one sees no interrupt: it ends when `stop` is set.

    The child leads a process group, so that its own children end with it. Its standard input is a pipe that is never
    written to: it closes when this process dies in whatever way, and the child then ends too.
    """
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with Popen(
        command, env=environment, stdin=PIPE, stderr=PIPE, text=True, errors="replace", start_new_session=True
    ) as process:
        reader = threading.Thread(target=_pass_on, args=(process.stderr, tail), daemon=True)
        reader.start()
        try:
            while stop is not None and process.poll() is None:
                if stop.wait(_POLL_S):
                    _end_group(process)
            process.wait()
        except BaseException:
            _end_group(process)
            raise
        finally:
            reader.join(GRACE_S)
    return process.returncode, " | ".join(line.strip() for line in tail if line.strip())


def _pass_on(stream: IO[str] | None, tail: deque[str]) -> None:
    """Copy a child's stderr to ours, which Dagster captures as compute log, and keep the last lines."""
    for line in stream or ():
        tail.append(line)
        sys.stderr.write(line)


def _end_group(process: Popen[str]) -> None:
    """Ask the child to end and clean up; after the grace period, end it. What it started never outlives it.

    A resumable stage takes the first request as leave to finish its piece, so there is a second one half-way.
    """
    for _ in range(2):
        process.terminate()
        with suppress(TimeoutExpired):
            process.wait(GRACE_S / 2)
            break
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (often: out of memory)" if -code == signal.SIGKILL else ""
    return f"was ended by signal {signal.Signals(-code).name}{hint}"


@contextmanager
def _forwarded_logs(context: dg.AssetExecutionContext) -> Iterator[None]:
    """Show the library's log records in the run's event log."""
    logger = logging.getLogger("spatial_core")
    handler = _ContextHandler(context)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _ContextHandler(logging.Handler):
    def __init__(self, context: dg.AssetExecutionContext) -> None:
        super().__init__(logging.INFO)
        self._context = context

    def emit(self, record: logging.LogRecord) -> None:
        self._context.log.log(record.levelno, record.getMessage())
