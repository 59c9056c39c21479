"""A SLURM job that asks to be queued again, once it has saved what it finished."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

_TIMEOUT_S = 30.0


def own_job(environ: Mapping[str, str]) -> str | None:
    """The job as SLURM's commands name it, `<array job>_<task>` for a task of an array; None outside a job."""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID")


def requeue(job: str) -> str | None:
    """Ask SLURM to queue a running job again; it then ends it here.

    A job that is being cancelled or has reached its limit is not asked for again: it would come back to life.

    Returns:
        None if it will be queued again, else why not.
    """
    state = _answer("squeue", "--noheader", "--jobs", job, "--format", "%T")
    if state != "RUNNING":
        return f"squeue says: {state or 'no such job'}"
    refusal = _answer("scontrol", "requeue", job)
    return f"scontrol says: {refusal}" if refusal else None


def _answer(*command: str) -> str:
    """What a command prints, in one line; for one that fails, why."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    text = " ".join((done.stdout + done.stderr).split())
    return text if done.returncode == 0 or text else f"{command[0]}: exit code {done.returncode}"
