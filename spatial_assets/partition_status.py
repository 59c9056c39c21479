"""Which partitions of an asset are made, missing or failed, from the instance's records."""

from __future__ import annotations

import dagster as dg

from spatial_core.quality.outcome import CheckOutcome

_SHOWN = 20


def partitions_complete(
    instance: dg.DagsterInstance, asset: str, partitions: dg.PartitionsDefinition[str]
) -> CheckOutcome:
    """Every registered key is made, and its last run did not fail. Only warns."""
    keys = partitions.get_partition_keys(dynamic_partitions_store=instance)
    status = instance.get_status_by_partition(dg.AssetKey(asset), keys, partitions) or {}
    names = {key: value.value if (value := status.get(key)) is not None else "MISSING" for key in keys}
    failed = [key for key, name in names.items() if name == "FAILED"]
    running = [key for key, name in names.items() if name == "IN_PROGRESS"]
    missing = [key for key, name in names.items() if name == "MISSING"]
    faults = []
    if failed:
        faults.append(f"{len(failed)} failed: {_some(failed)}")
    if missing:
        faults.append(f"{len(missing)} missing: {_some(missing)}")
    made = len(keys) - len(failed) - len(running) - len(missing)
    summary = "; ".join(faults) if faults else f"all {made} keys made" + (f", {len(running)} running" * bool(running))
    figures = {"made": made, "failed": failed, "missing": missing, "running": running}
    return CheckOutcome("partitions_complete", not faults, summary, "warn", figures)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
