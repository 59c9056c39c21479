"""Where and at what cost a job made an artifact, for the asset's metadata.

The figures are those of the accounting row by which the job was judged, under the names that dagster-slurm gives them.
Its own collector is not used: it would ask accounting a second time, and it writes zeros for what accounting does not
know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg

from spatial_core.cluster.ending import VANISHED, Ending, usage_record
from spatial_core.cluster.following import Done
from spatial_core.config.compute import ComputeSection

_COSTS = {"job_cpu_s", "job_core_s", "job_gpu_s", "job_cost", "node_hours"}


def job_metadata(asset: str, done: Done, compute: ComputeSection) -> dict[str, Any]:
    """Metadata of a task that has ended, well or not; empty for one that never started.

    By dagster-slurm's names: `slurm_job_id`, `slurm_state`, `slurm_exit_code`, `elapsed_seconds`, `max_memory_mb`,
    `cpu_efficiency_pct`, `node_hours`, `slurm_allocated_gpus`, `slurm_tres_accounting`. By ours: the command that shows
    everything accounting knows, node, CPU, core and GPU seconds, GPU utilisation, cost, and the log of a failure. A job
    that was queued again shows the number of its attempts, and seconds and cost of all of them.
    """
    ending = done.ending
    if ending is None:
        return {}
    prices = (compute.cost_per_gpu_hour, compute.cost_per_cpu_hour)
    record = usage_record(ending, asset, done.key, done.usage, prices)
    attempts = [usage_record(attempt, asset, done.key, {}, prices) for attempt in ending.attempts]
    if len(attempts) > 1:
        record |= {name: _added(attempt[name] for attempt in attempts) for name in ("cpu_s", "core_s", "gpu_s", "cost")}
    shown = _named_by_dagster_slurm(ending)
    shown["job_accounting"] = dg.MetadataValue.text(f"sacct -j {ending.task_id} --format=ALL")
    names = ("node", "cpu_s", "core_s", "gpu_s", "gpu_utilisation")
    shown |= {f"job_{name}": record[name] for name in names if record[name] not in (None, "")}
    if compute.cost_per_gpu_hour or compute.cost_per_cpu_hour:
        shown["job_cost"] = record["cost"]
    if len(attempts) > 1:
        shown["job_attempts"] = len(attempts)
    if done.log:
        shown["job_log"] = dg.MetadataValue.path(done.log)
    return shown


def summed(tasks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Metadata of an artifact that several tasks made together: their ids, and their costs added up."""
    made = [task for task in tasks if "slurm_job_id" in task]
    if not made:
        return {}
    costs = {name for task in made for name in task if name in _COSTS}
    total = {name: sum(_plain(task.get(name, 0)) for task in made) for name in sorted(costs)}
    return {"slurm_job_id": ", ".join(str(_plain(task["slurm_job_id"])) for task in made), **total}


def _added(values: Iterable[float | None]) -> float | None:
    """The sum of what is known; None when nothing is."""
    known = [value for value in values if value is not None]
    return round(sum(known), 6) if known else None


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, dg.MetadataValue) else value


def _named_by_dagster_slurm(ending: Ending) -> dict[str, Any]:
    from dagster_slurm.helpers.metrics import SlurmJobMetrics, SlurmMetric

    metrics = SlurmJobMetrics(
        job_id=int(ending.task_id.partition("_")[0]),
        elapsed_seconds=ending.elapsed_s,
        cpu_time_seconds=ending.cpu_s or 0,
        max_rss_mb=ending.memory_mb or 0,
        node_hours=ending.elapsed_s / 3600 * ending.nodes,
        cpu_efficiency=min(1.0, (ending.cpu_s or 0) / max(1, ending.cores_s)),
        state=ending.state,
        exit_code=ending.exit_code,
        accounting_available=ending.state != VANISHED,
        allocated_gpus=ending.gpus or None,
        accounting_rows=({"JobID": ending.task_id, "NodeList": ending.node, "AllocTRES": ending.tres},),
    )
    # What accounting does not know is left out; dagster-slurm has no empty values.
    unknown = {SlurmMetric.GPU_ACCOUNTING_AVAILABLE}
    if ending.memory_mb is None:
        unknown.add(SlurmMetric.MAX_MEMORY)
    if ending.cpu_s is None or not ending.cores_s:
        unknown.add(SlurmMetric.CPU_EFFICIENCY)
    # As text: a task of an array is `123_4`.
    return metrics.to_metadata(frozenset(SlurmMetric) - unknown) | {"slurm_job_id": ending.task_id}
