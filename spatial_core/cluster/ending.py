"""How a cluster job ended: figures from accounting, and the typed failure with a remedy where one is known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from spatial_core.cluster.resources import Resources, megabytes
from spatial_core.cluster.scheduler import Accounted
from spatial_core.errors import (
    JobCancelled,
    JobFailed,
    JobOutOfMemory,
    JobPreempted,
    JobTimedOut,
    JobVanished,
    NodeFailed,
)
from spatial_core.jobs.messages import Said

TERMINAL = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
VANISHED = "VANISHED"  # not a state of accounting: neither it nor the queue knows the task
_AGAIN = "materialize again; finished pieces are kept"
_NOT_BEGUN = (
    "the stage had not begun: look at compute.setup, compute.container and the environment; `spatial cluster check` "
    "tries them"
)
_FAILURES: dict[str, tuple[type[JobFailed], str]] = {
    "OUT_OF_MEMORY": (
        JobOutOfMemory,
        "ask for more memory than {mem} (compute.resources.{asset}.mem), use smaller batches, or set compute.retries "
        "to have it sent again with more",
    ),
    "TIMEOUT": (
        JobTimedOut,
        "ask for more time than {time} (compute.resources.{asset}.time_limit), or set compute.retries; finished "
        "pieces are kept",
    ),
    "INTERRUPTED": (
        JobTimedOut,
        "it was told to stop and had got no further than the time before; ask for more time than {time} "
        "(compute.resources.{asset}.time_limit)",
    ),
    "DEADLINE": (JobTimedOut, "it could not end before its --deadline"),
    "PREEMPTED": (JobPreempted, _AGAIN + "; or use a partition whose jobs are not preempted"),
    "REVOKED": (JobPreempted, _AGAIN),
    "CANCELLED": (JobCancelled, "somebody used scancel, or the cluster's administration did; " + _AGAIN),
    "NODE_FAIL": (NodeFailed, _AGAIN),
    "BOOT_FAIL": (NodeFailed, _AGAIN),
    VANISHED: (JobVanished, "neither the queue nor the accounting knows it; materialize again"),
}
# Reasons for waiting that only people can take away, by changing the job or the cluster.
_NEVER_STARTS = re.compile(
    r"PartitionTimeLimit|PartitionNodeLimit|PartitionConfig|BadConstraints|DependencyNeverSatisfied|InvalidAccount"
    r"|InvalidQOS|AccountNotAllowed|QOSNotAllowed"
    r"|(Assoc|QOS)Max\w+Per(Job|Node)\w*"
)
# Reasons by which SLURM says that it has given up starting a job, and holds it until somebody releases it.
_GIVEN_UP = re.compile(r"launch.failed.requeued.held|JobHoldMaxRequeue")
_TAIL_LINES = 5
_NEAR_LIMIT = 0.97  # of the memory asked for: accounting samples now and then, so a killed job's peak is above it


@dataclass(frozen=True)
class Ending:
    """The last attempt of a task, or an earlier one.

    Args:
        task_id: as the scheduler names it.
        state: of accounting, one word; VANISHED when neither queue nor accounting knows the task.
        by: number of the user who cancelled it, empty where nobody did.
        exit_code: of the job, 0 when a signal ended it.
        signal: that ended it, 0 for none.
        elapsed_s: seconds it ran.
        cpu_s: seconds of processor time it used; None where accounting does not know.
        cores_s: core seconds that were allocated to it.
        memory_mb: peak resident memory, MiB; None where accounting does not know.
        memory_asked_mb: memory it had asked for, MiB.
        gpus: GPUs allocated.
        nodes: nodes allocated.
        tres: everything allocated, as accounting writes it.
        node: where it ran.
        partition: which partition it ran in.
        start, end: as accounting writes them.
        earlier: attempts before it, which ended in a requeue; oldest first.
    """

    task_id: str
    state: str
    by: str = ""
    exit_code: int = 0
    signal: int = 0
    elapsed_s: int = 0
    cpu_s: float | None = None
    cores_s: int = 0
    memory_mb: float | None = None
    memory_asked_mb: float | None = None
    gpus: int = 0
    nodes: int = 0
    tres: str = ""
    node: str = ""
    partition: str = ""
    start: str = ""
    end: str = ""
    earlier: tuple[Ending, ...] = ()

    def with_reported(self, usage: Mapping[str, Any]) -> Ending:
        """With the peak of memory that the job itself measured, where accounting, which samples, saw less."""
        reported = max(usage.get(name) or 0 for name in ("peak_rss_bytes", "peak_child_rss_bytes")) / 2**20
        return replace(self, memory_mb=reported) if reported > (self.memory_mb or 0) else self

    @property
    def attempts(self) -> tuple[Ending, ...]:
        """All attempts, oldest first: each took time and may have cost something."""
        return (*self.earlier, self)

    @property
    def out_of_memory(self) -> bool:
        """Killed for its memory: SLURM without control groups calls that FAILED with signal 9."""
        if self.state == "OUT_OF_MEMORY":
            return True
        if self.state != "FAILED" or 9 not in (self.signal, self.exit_code - 128) or self.memory_mb is None:
            return False
        return self.memory_asked_mb is not None and self.memory_mb >= self.memory_asked_mb * _NEAR_LIMIT


def ending_of(task_id: str, accounted: Accounted) -> Ending:
    """Read the accounting rows of a task that has ended."""
    job = accounted.job
    code, _, signal = job["ExitCode"].partition(":")
    cores = _allocated(job, "cpu")
    return Ending(
        task_id,
        accounted.state,
        by=job["State"].partition(" by ")[2],
        exit_code=int(code or 0),
        signal=int(signal or 0),
        elapsed_s=int(job["ElapsedRaw"] or 0),
        cpu_s=_seconds(job["TotalCPU"]),
        cores_s=int(job["CPUTimeRAW"] or 0),
        memory_mb=max(filter(None, (_memory(step["MaxRSS"], 1) for step in accounted.steps)), default=None),
        memory_asked_mb=_memory(job["ReqMem"], cores),
        gpus=_allocated(job, "gres/gpu"),
        nodes=_allocated(job, "node"),
        tres=job["AllocTRES"],
        node=job["NodeList"].replace("None assigned", ""),
        partition=job["Partition"],
        start=job["Start"],
        end=job["End"],
        earlier=tuple(ending_of(task_id, attempt) for attempt in accounted.earlier),
    )


def never_starts(state: str, reason: str) -> bool:
    """Whether a task in the queue waits for what will not happen by itself."""
    return state == "PENDING" and _NEVER_STARTS.fullmatch(reason) is not None


def given_up(state: str, reason: str) -> bool:
    """Whether SLURM could not start a task and holds it: a node failed it, or a controller that lost its memory."""
    return state == "PENDING" and _GIVEN_UP.fullmatch(reason) is not None


def usage_record(
    ending: Ending, asset: str, key: str, said: Mapping[str, Any], prices: tuple[float, float]
) -> dict[str, Any]:
    """One line of the cluster's usage: what a task took and what it cost.

    Args:
        ending: of the task.
        asset: asset it made.
        key: partition key.
        said: what the job itself reported of its use.
        prices: of a GPU hour and of a CPU hour.
    """
    gpu_s = ending.gpus * ending.elapsed_s
    per_gpu, per_cpu = prices
    return {
        "asset": asset,
        "partition_key": key,
        "job": ending.task_id,
        "state": ending.state,
        "node": ending.node,
        "partition": ending.partition,
        "start": ending.start,
        "end": ending.end,
        "elapsed_s": ending.elapsed_s,
        "cpu_s": ending.cpu_s,
        "core_s": ending.cores_s,
        "gpu_s": gpu_s,
        "memory_mb": ending.memory_mb,
        "memory_asked_mb": ending.memory_asked_mb,
        "gpu_utilisation": said.get("gpu_utilisation"),
        "cost": round(gpu_s / 3600 * per_gpu + ending.cores_s / 3600 * per_cpu, 6),
    }


def failure_of(ending: Ending, asset: str, resources: Resources, log: str, said: Said) -> JobFailed:
    """The typed failure of a task that did not end well.

    Args:
        ending: how it ended.
        asset: what it was to make.
        resources: what it had asked for.
        log: last bytes of its output.
        said: what it reported: an unexpected error, or that it was interrupted.
    """
    kind, remedy = _kind(ending, said)
    reported = said.exception or (said.interrupted or {}).get("message")
    how = [f"exit code {ending.exit_code}" if not ending.signal else f"signal {ending.signal}"]
    how.append(f"after {ending.elapsed_s} s")
    if ending.memory_mb is not None:
        how.append(f"peak memory {ending.memory_mb:.0f} MiB of {ending.memory_asked_mb or 0:.0f}")
    if ending.node:
        how.append(f"on {ending.node}")
    lines = [line.strip() for line in log.splitlines() if line.strip()][-_TAIL_LINES:]
    by = f" by user {ending.by}" if ending.by else ""
    parts = [f"job {ending.task_id} ended {ending.state}{by} ({', '.join(how)})"]
    if reported:
        parts.append(reported)
    if remedy:
        parts.append(remedy.format(asset=asset, mem=resources.mem, time=resources.time_limit))
    parts.append(f"last lines: {' | '.join(lines) or 'none'}")
    return kind("; ".join(parts))


def _kind(ending: Ending, said: Said) -> tuple[type[JobFailed], str]:
    state = "OUT_OF_MEMORY" if ending.out_of_memory else ending.state
    if state == "FAILED" and said.interrupted is not None:
        state = "INTERRUPTED"
    if state == "FAILED" and not said.attempts:
        return JobFailed, _NOT_BEGUN
    return _FAILURES.get(state, (JobFailed, ""))


def _allocated(job: Mapping[str, str], resource: str) -> int:
    """What AllocTRES, `billing=8,cpu=8,gres/gpu:h100=1,gres/gpu=1,mem=32G`, has of a resource."""
    amounts = dict(part.partition("=")[::2] for part in job["AllocTRES"].split(","))
    return int(amounts.get(resource, 0))


def _seconds(text: str) -> float | None:
    """`1-02:03:04.500` as seconds; None when unknown."""
    if not re.fullmatch(r"(\d+-)?(\d+:)*\d+(\.\d+)?", text):
        return None
    days, dash, rest = text.rpartition("-")
    total = 0.0
    for part in rest.split(":"):
        total = total * 60 + float(part)
    return total + (int(days) * 86400 if dash else 0)


def _memory(text: str, cores: int) -> float | None:
    """`1234K`, `4G` (or `4Gn` a node, `4Gc` a core of older releases) as MiB; None when unknown or 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)([nc]?)", text)
    if match is None or not float(match[1]):
        return None
    amount = float(match[1]) * megabytes(f"1{match[2]}") if match[2] else float(match[1]) / 2**20
    return amount * cores if match[3] == "c" else amount
