"""`python -m tests.slurm.worker CONFIG INSTANCE ASSET KEY`: a Dagster run in a process of its own, as its worker is."""

from __future__ import annotations

import sys
from pathlib import Path

import dagster as dg
from dagster._utils.interrupts import setup_interrupt_handlers

from spatial_assets.definitions import definitions_with
from spatial_assets.defs.resources import SettingsResource


def open_instance(folder: Path) -> dg.DagsterInstance:
    """The Dagster instance of a folder, which several processes may use at a time."""
    folder.mkdir(exist_ok=True)
    return dg.DagsterInstance.local_temp(str(folder), overrides={"telemetry": {"enabled": False}})


def main(config: str, instance_dir: str, asset: str, key: str) -> None:
    """Materialize one partition."""
    setup_interrupt_handlers()  # as Dagster's own workers do: SIGTERM counts as an interrupt
    job = definitions_with(settings=SettingsResource(config_file=config)).resolve_implicit_global_asset_job_def()
    with open_instance(Path(instance_dir)) as instance:
        job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey(asset)], partition_key=key)


if __name__ == "__main__":
    main(*sys.argv[1:])
