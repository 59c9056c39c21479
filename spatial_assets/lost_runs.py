"""Runs whose process is gone.

After a machine went down, a run that it was executing stays "started" for ever and keeps its pools: the launcher of one
machine cannot tell. So each run says which process executes it, and whoever finds that process gone ends the run;
Dagster then starts it again, once, and stages go on from what is there.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import dagster as dg

WORKER_TAG = "spatial/worker"


def mark_worker(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """Note on a run that this process executes it."""
    worker = f"{run.run_id}/{socket.gethostname()}/{os.getpid()}/{_started(os.getpid())}"
    if run.tags.get(WORKER_TAG) != worker:
        instance.add_run_tags(run.run_id, {WORKER_TAG: worker})


def end_lost_runs(instance: dg.DagsterInstance) -> list[str]:
    """End the runs in progress whose process on this machine is gone; returns their ids."""
    lost = [
        run
        for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
        if _gone(run.run_id, run.tags.get(WORKER_TAG, ""))
    ]
    for run in lost:
        instance.report_run_failed(run, f"the process that executed this run is gone ({run.tags[WORKER_TAG]})")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    return [run.run_id for run in lost]


def _gone(run_id: str, worker: str) -> bool:
    """Whether a process was of this machine and is no more; another one may have its number by now.

    A run that is started again inherits the tags of the one before: until it marks itself, the tag is about that one.
    """
    marked, _, place = worker.partition("/")
    host, _, process = place.partition("/")
    pid, _, started = process.partition("/")
    here = marked == run_id and host == socket.gethostname()
    return here and pid.isdigit() and _started(int(pid)) != started


def _started(pid: int) -> str:
    """When a process started, in clock ticks since the machine did, with the machine's boot; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot[:8]}-{fields[19]}"
