"""`python -m spatial_core.jobs STAGE --call FILE | --task FILE`: one stage in a process of its own.

The file of `--call` holds a `StageCall` as JSON, that of `--task` a `Task`: a cluster job's call and how to run it.
Started by Dagster (a Pipes session in the environment, which a task brings along) it reports there; otherwise it prints
the report as JSON on stdout. Logs go to stderr. The exit code is 0, 1 with a one-line cause for an expected failure, 2
for a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from spatial_core.errors import ConfigError, SpatialError
from spatial_core.jobs.pacing import PacedProgress
from spatial_core.jobs.pipes import end_cleanly_on_termination, end_with_parent, run_reporting, started_by_dagster
from spatial_core.jobs.registry import STAGES, StageCall, run_stage
from spatial_core.jobs.task import Task

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
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("spatial_core").setLevel(logging.INFO)
    end_cleanly_on_termination()
    if given.until_stdin_closes:
        end_with_parent()
    file: Path = given.call or given.task
    try:
        task = Task(StageCall.from_json(file.read_text())) if given.call else Task.read(file)
    except (ConfigError, OSError, ValueError, KeyError) as error:
        parser.error(f"{file}: not a readable stage call ({error})")
    call = task.call
    if call.stage != given.stage:
        parser.error(f"{file} is for stage {call.stage}, not {given.stage}")
    os.environ.update(task.environment)
    if started_by_dagster():
        return run_reporting(call)
    try:
        report = run_stage(call, PacedProgress(_LOG.info))
    except SpatialError as error:
        _LOG.error("%s: %s", type(error).__name__, " ".join(str(error).split()))
        return 1
    sys.stdout.write(json.dumps(report.to_json(), sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
