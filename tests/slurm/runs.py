"""Dagster runs over a lake on the cluster, in this process or in one that can be killed, and what they leave behind."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import dagster as dg
import psutil

from spatial_assets.definitions import definitions_with
from spatial_assets.defs.resources import SettingsResource
from spatial_assets.partitions import RANGE_TAGS
from spatial_core.cluster.transport import Ssh, transport_for
from tests.slurm.client import Slurm
from tests.slurm.lakes import REPOSITORY, ClusterLake


@dataclass(frozen=True)
class Ran:
    """A Dagster run that has ended."""

    instance: dg.DagsterInstance
    result: dg.ExecuteInProcessResult

    @property
    def success(self) -> bool:
        return self.result.success

    @cached_property
    def lines(self) -> list[str]:
        """Log lines of the run."""
        logs = self.instance.all_logs(self.result.run_id)
        return [entry.user_message for entry in logs if not entry.is_dagster_event]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Of the only materialization; or, when the run failed, of its failure."""
        if not self.success:
            return {name: value.value for name, value in self._failure.metadata.items()}
        (made,) = [event for event in self.result.all_events if event.is_step_materialization]
        return {name: value.value for name, value in made.materialization.metadata.items()}

    @property
    def cause(self) -> str:
        """The line the UI shows of the failed step."""
        return str(self._failure.description)

    @property
    def _failure(self) -> Any:
        (event,) = [event for event in self.result.all_events if event.is_step_failure]
        assert event.step_failure_data.user_failure_data is not None, event.step_failure_data.error
        return event.step_failure_data.user_failure_data


def run(lake: ClusterLake, instance: dg.DagsterInstance, asset: str, *keys: str) -> Ran:
    """Materialize some partitions of an asset, or an asset without partitions, in this process."""
    definitions = definitions_with(settings=SettingsResource(config_file=str(lake.config)))
    result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance,
        asset_selection=[dg.AssetKey(asset)],
        tags=dict(zip(RANGE_TAGS, (keys[0], keys[-1]), strict=True)) if len(keys) > 1 else None,
        partition_key=keys[0] if len(keys) == 1 else None,
        raise_on_error=False,
    )
    return Ran(instance, result)


@contextmanager
def worker(lake: ClusterLake, instance_dir: Path, asset: str, key: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run of one partition in a process of its own, which can be killed."""
    argv = [sys.executable, "-m", "tests.slurm.worker", str(lake.config), str(instance_dir), asset, key]
    process = subprocess.Popen(argv, cwd=REPOSITORY)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def sent(slurm: Slurm, folder: Path) -> list[str]:
    """Ids of all jobs whose job folder lies in a folder, in any state; an array counts once."""
    ended = slurm.run("sacct", "-n", "-P", "-X", "-S", "now-1days", "--format=JobID,WorkDir")
    held = slurm.run("squeue", "-h", "-o", "%F|%Z")  # accounting does not list what cannot start yet
    rows = [line.split("|") for line in (ended + "\n" + held).splitlines() if line]
    return sorted({name.split("_")[0] for name, work in rows if Path(work).is_relative_to(folder)}, key=int)


def first_job(slurm: Slurm, folder: Path) -> str:
    """The first job of a folder, once there is one."""
    return slurm.wait_for(lambda: sent(slurm, folder), what="a job")[0]


def close_connection(lake: ClusterLake) -> None:
    """End the shared ssh connection, which would stay for some minutes."""
    transport = transport_for(lake.settings)
    if isinstance(transport, Ssh):
        transport.close()


@dataclass
class Connections:
    """How many connections to a port were open at a time."""

    port: int
    most: int = 0

    def watch(self, over: Callable[[], bool]) -> None:
        """Count now and then until it is over."""
        while not over():
            found = [
                connection
                for connection in psutil.net_connections("tcp")
                if connection.status == "ESTABLISHED" and connection.laddr and connection.laddr.port == self.port
            ]
            self.most = max(self.most, len(found))
            time.sleep(0.05)
