"""What a job used: time, memory, and how busy its GPUs were, measured by the job itself.

A scheduler's accounting knows none of the GPU figures and often lags behind; these arrive with the outcome.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from spatial_core.jobs.gpu_usage import GpuSampler, open_gpus
from spatial_core.storage.hardware import usable_cores

_LOG = logging.getLogger(__name__)
_EVERY_S = 5.0
_GPUS_ASKED_FOR = ("SLURM_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS")
_SLURM = {
    "job_id": "SLURM_JOB_ID",
    "array_job_id": "SLURM_ARRAY_JOB_ID",
    "array_task_id": "SLURM_ARRAY_TASK_ID",
    "restart_count": "SLURM_RESTART_COUNT",
    "partition": "SLURM_JOB_PARTITION",
    "node": "SLURMD_NODENAME",
}


class UsageMeter:
    """Measures this process and its children from `with` to the end of the block.

    GPUs are sampled in a thread every few seconds; they are left out where there is no driver, which is logged in a job
    that was given some.

    Args:
        every_s: time between two looks at the GPUs, in seconds.
    """

    def __init__(self, *, every_s: float = _EVERY_S) -> None:
        self._every_s = every_s
        self._began = time.monotonic()
        self._wall_s: float | None = None
        self._gpus: GpuSampler | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        opened = open_gpus(os.environ)
        if isinstance(opened, str):
            if any(os.environ.get(name) for name in _GPUS_ASKED_FOR):
                _LOG.info("no GPU figures: %s", opened)
            return self
        self._gpus = opened
        self._thread = threading.Thread(target=self._sample, name="gpu-usage", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wall_s = time.monotonic() - self._began
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def record(self) -> dict[str, Any]:
        """The figures as JSON.

        `cpu_s` is user and system time of this process and of its children that have ended; `peak_rss_bytes` is the
        most memory this process had resident, `peak_child_rss_bytes` the same of its largest child. Fields of `slurm`
        are None outside a job. `gpus` is empty when there are none to look at; `gpu_utilisation` is the share of time,
        0 to 1, that they were busy, over all of them.
        """
        own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        wall_s = time.monotonic() - self._began if self._wall_s is None else self._wall_s
        gpus = [] if self._gpus is None else self._gpus.record()
        busy = [gpu["utilisation_mean_pct"] for gpu in gpus if gpu["utilisation_mean_pct"] is not None]
        return {
            "host": socket.gethostname(),
            "wall_s": round(wall_s, 3),
            "cpu_s": round(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime, 3),
            "cores": usable_cores(),
            "peak_rss_bytes": _peak_rss_bytes(),
            "peak_child_rss_bytes": children.ru_maxrss * 1024,
            "slurm": slurm_identity(os.environ),
            "gpus": gpus,
            "gpu_utilisation": round(sum(busy) / len(busy) / 100, 4) if busy else None,
        }

    def _sample(self) -> None:
        while self._gpus is not None:
            self._gpus.look()
            if self._done.wait(self._every_s):
                break


def slurm_identity(environ: Mapping[str, str]) -> dict[str, str | None]:
    """The job this process belongs to, as SLURM told it: ids, how often it was started again, partition and node."""
    return {name: environ.get(variable) for name, variable in _SLURM.items()}


def _peak_rss_bytes() -> int:
    """Peak of this program's own memory; `ru_maxrss` also counts what the process was before it became this program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
