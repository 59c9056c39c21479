"""`python -m spatial_core.jobs STAGE --call FILE | --task FILE`: one stage in a process of its own.

The file of `--call` holds a `StageCall` as JSON, that of `--task` a `Task`: a cluster job's call and how to run it.
Started by Dagster (a Pipes session in the environment, which a task brings along) it reports there; otherwise it prints
the report as JSON on stdout. Logs go to stderr.

SIGTERM lets a stage that keeps resumable pieces finish the one in hand, and ends any other at once. The job then asks
SLURM to queue it again if the task says so.

Started by `torchrun`, the processes of a stage that can be shared do so, and the first of them reports.

Exit codes: 0 done; 1 failed, with a one-line cause; 2 a wrong command line; 75 interrupted, to be run again; 143 ended
by SIGTERM at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from spatial_core.errors import ConfigError, Interrupted, SpatialError
from spatial_core.interruption import leaving, obey_termination
from spatial_core.jobs.light_start import start_light
from spatial_core.jobs.pacing import PacedProgress
from spatial_core.jobs.pipes import EXIT_FAILED, EXIT_INTERRUPTED, end_with_parent, run_reporting, started_by_dagster
from spatial_core.jobs.registry import STAGES, StageCall, run_stage
from spatial_core.jobs.requeue import own_job, requeue
from spatial_core.jobs.task import Task
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.scratch import local_scratch

_LOG = logging.getLogger("spatial_core.jobs")


def main(arguments: list[str] | None = None) -> int:
    """Run the stage named on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m spatial_core.jobs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stage", choices=list(STAGES), help="name of the stage")
    given_as = parser.add_mutually_exclusive_group(required=True)
    given_as.add_argument("--call", type=Path, metavar="FILE", help="JSON file with the stage call")
    given_as.add_argument("--task", type=Path, metavar="FILE", help="JSON file with the task of a cluster job")
    parser.add_argument(
        "--until-stdin-closes", action="store_true", help="end when standard input closes, that is, with the parent"
    )
    given = parser.parse_args(arguments)
    rank = int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0
    origin = "%(name)s" if not rank else f"process {rank} %(name)s"
    logging.basicConfig(stream=sys.stderr, format=f"%(asctime)s %(levelname)s {origin}: %(message)s")
    logging.getLogger("spatial_core").setLevel(logging.INFO)
    obey_termination()
    start_light()
    if given.until_stdin_closes:
        end_with_parent()
    file: Path = given.call or given.task
    try:
        task = Task(StageCall.from_json(file.read_text())) if given.call else Task.read(file)
    except (ConfigError, OSError, ValueError, KeyError) as error:
        parser.error(f"{file}: not a readable stage call ({error})")
    if task.call.stage != given.stage:
        parser.error(f"{file} is for stage {task.call.stage}, not {given.stage}")
    os.environ.update(task.environment)

    def work(progress: Progress) -> Report:
        with local_scratch(task.scratch):
            return run_stage(task.call, progress)

    if rank:
        return _run(work, silent, lambda report: None)
    code = run_reporting(work) if started_by_dagster() else _run(work, PacedProgress(_LOG.info), _print)
    if code == EXIT_INTERRUPTED and task.requeue:
        _queue_again()
    return code


def _run(work: Callable[[Progress], Report], progress: Progress, tell: Callable[[Report], None]) -> int:
    try:
        report = work(progress)
    except SpatialError as error:
        _LOG.error("%s: %s", type(error).__name__, " ".join(str(error).split()))
        return EXIT_INTERRUPTED if isinstance(error, Interrupted) else EXIT_FAILED
    finally:
        leaving()
    tell(report)
    return 0


def _print(report: Report) -> None:
    sys.stdout.write(json.dumps(report.to_json(), sort_keys=True) + "\n")


def _queue_again() -> None:
    job = own_job(os.environ)
    if job is None:
        return
    refusal = requeue(job)
    if refusal is None:
        _LOG.info("job %s will be queued again", job)
    else:
        _LOG.warning("job %s is not queued again, it has to be submitted anew: %s", job, refusal)


if __name__ == "__main__":
    sys.exit(main())
