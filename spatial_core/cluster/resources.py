"""What the jobs of each asset may use on a cluster: defaults, the settings laid over them, and more after a failure."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from spatial_core.config.compute import ComputeSection, ResourcesSection
from spatial_core.errors import ConfigError

_UNITS = {"K": 1 / 1024, "M": 1, "": 1, "G": 1024, "T": 1024 * 1024}


@dataclass(frozen=True)
class Resources:
    """What one task of an asset may use.

    Args:
        cpus: cores.
        mem: memory a node, as sbatch takes it.
        time_limit: as sbatch takes it.
        gpus: GPUs a node, a number or type:number; None for none.
        partition, account, qos, constraint: where and on whose account; None leaves it to the cluster.
        nodes: more than one only for distributed training.
        processes_per_node: training processes a node; None means one a GPU.
        max_parallel: tasks of one array that run at a time.
        extra: further sbatch options.
    """

    cpus: int
    mem: str
    time_limit: str
    gpus: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = 1
    processes_per_node: int | None = None
    max_parallel: int = 50
    extra: tuple[str, ...] = ()

    @property
    def gpu_count(self) -> int:
        """GPUs a node."""
        return int(self.gpus.rpartition(":")[2]) if self.gpus else 0

    @property
    def processes(self) -> int:
        """Processes a node: one, or those of distributed training."""
        return self.processes_per_node or max(1, self.gpu_count)

    def options(self) -> list[str]:
        """As sbatch options."""
        given = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": self.cpus,
            "mem": self.mem,
            "gres": f"gpu:{self.gpus}" if self.gpus else None,
            "time": self.time_limit,
        }
        return [*(f"--{name}={value}" for name, value in given.items() if value is not None), *self.extra]

    def with_more_memory(self, factor: float) -> Resources:
        """For a task that ran out of memory."""
        return replace(self, mem=f"{max(1, round(megabytes(self.mem) * factor))}M")

    def with_more_time(self, factor: float) -> Resources:
        """For a task that ran out of time."""
        return replace(self, time_limit=_as_limit(round(limit_seconds(self.time_limit) * factor)))


# Cores, memory, time and GPUs of the earlier pipeline's jobs. Its memory was chosen for tables held in pandas: ours
# needs far less, so a cluster that charges for memory is worth a look at `cluster_usage` after the first tars.
DEFAULTS: dict[str, Resources] = {
    "intermediates": Resources(cpus=1, mem="32G", time_limit="02:00:00"),
    "fingerprints": Resources(cpus=1, mem="8G", time_limit="02:00:00"),
    "backbone_embeddings": Resources(cpus=6, mem="126G", time_limit="24:00:00", gpus="1"),
    "merged_splits": Resources(cpus=8, mem="100G", time_limit="12:00:00"),
    "difficulty_metadata": Resources(cpus=16, mem="124G", time_limit="01:00:00"),
    "tuning_study": Resources(cpus=8, mem="64G", time_limit="24:00:00", gpus="1"),
    "projector_checkpoint": Resources(cpus=8, mem="256G", time_limit="48:00:00", gpus="1"),
    "retrieval_report": Resources(cpus=8, mem="64G", time_limit="02:00:00"),
    "hf_model": Resources(cpus=4, mem="64G", time_limit="01:00:00"),
    "final_embeddings": Resources(cpus=6, mem="126G", time_limit="24:00:00", gpus="1"),
    "building_embeddings": Resources(cpus=2, mem="16G", time_limit="01:00:00"),
}
_OTHER = Resources(cpus=1, mem="4G", time_limit="01:00:00")


def resources_for(compute: ComputeSection, asset: str) -> Resources:
    """Resources of an asset: its defaults, with what the settings say laid over them.

    Raises:
        ConfigError: if the settings name an asset that does not exist, or several nodes for work that uses one.
    """
    unknown = [name for name in compute.resources if name not in DEFAULTS]
    if unknown:
        raise ConfigError(f"compute.resources.{unknown[0]}: no such asset; there are {', '.join(DEFAULTS)}")
    everywhere = {name: getattr(compute, name) for name in ("partition", "account", "qos", "max_parallel")}
    own = compute.resources.get(asset, ResourcesSection()).model_dump(exclude_none=True)
    chosen: dict[str, Any] = {name: value for name, value in everywhere.items() if value is not None} | own
    if chosen.get("gpus") == "0":
        chosen["gpus"] = None
    resources = replace(DEFAULTS.get(asset, _OTHER), **chosen)
    if (resources.nodes > 1 or resources.processes_per_node) and asset != "projector_checkpoint":
        raise ConfigError(
            f"compute.resources.{asset}: nodes and processes_per_node are for projector_checkpoint, which trains "
            "distributed; everything else runs in one process"
        )
    return resources


def megabytes(memory: str) -> float:
    """Memory as sbatch writes it, in MiB."""
    number, unit = re.fullmatch(r"(\d+)([KMGT]?)", memory).groups()  # type: ignore[union-attr]
    return float(number) * _UNITS[unit]


def limit_seconds(limit: str) -> int:
    """A time limit as sbatch writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes..]."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def _as_limit(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{seconds:02}" if days else f"{hours:02}:{minutes:02}:{seconds:02}"
