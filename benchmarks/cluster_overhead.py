"""What it costs to send an asset to a cluster when there is nothing to compute: local, on the login node, over ssh.

Every round materializes partitions whose artifacts are up to date, through Dagster, with the default settings: one key
(one job, through dagster-slurm) and several (a job array). What is above the local time is the price of SLURM: handing
over, starting Python on the node, noticing the end, accounting. dagster-slurm's own client is measured beside it, with
an empty script. Ours and local take turns, so that all meet the same noise of a shared machine.

Needs the cluster that `make slurm-up` starts.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path

import dagster as dg
from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS
from spatial_core.storage.hardware import usable_cores
from tests.slurm.client import Slurm
from tests.slurm.cluster.cluster import Cluster
from tests.slurm.cluster.daemon import kill_all
from tests.slurm.cluster.layout import Layout, default_folder
from tests.slurm.lakes import ClusterLake
from tests.slurm.runs import close_connection, run

BARS_S = {"slurm_login": 4.0, "slurm_ssh": 7.0}
PROFILES = ("local", "slurm_login", "slurm_ssh")
KEYS = ("0901", "0902", "0903")


def measure(slurm: Slurm, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Wall seconds of every round by `profile keys`, and the processes left on the login node by ours and theirs."""
    walls: dict[str, list[float]] = {}
    left: dict[str, int] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=slurm.work, prefix="overhead-")))
        instance = stack.enter_context(dg.DagsterInstance.ephemeral())
        lakes = {profile: ClusterLake(folder / f"{profile}.toml", slurm) for profile in PROFILES}
        for profile, lake in lakes.items():
            lake.write(profile, isolation="subprocess", poll_s=1.0, poll_max_s=30.0)  # the defaults
        lakes["local"].draw_city()
        instance.add_dynamic_partitions("tar", list(KEYS))
        stack.callback(close_connection, lakes["slurm_ssh"])
        contenders: dict[str, Callable[[], object]] = {}
        for profile, lake in lakes.items():
            contenders[f"{profile} 1 key"] = partial(_run, lake, instance, KEYS[:1])
            contenders[f"{profile} {len(KEYS)} keys"] = partial(_run, lake, instance, KEYS)
        _run(lakes["local"], instance, KEYS)  # makes the artifacts
        for turn in range(rounds):
            for name in contenders if turn % 2 == 0 else reversed(contenders):
                walls.setdefault(name, []).append(_timed(contenders[name]))
        left["ours"] = len(slurm.cluster.login_processes())
        # Not taking turns: what it leaves behind would be counted as ours.
        walls["dagster-slurm 1 key"] = [_timed(partial(_as_it_is, slurm, folder, instance)) for _ in range(rounds)]
        left["dagster-slurm"] = len(slurm.cluster.login_processes()) - left["ours"]
        kill_all(slurm.cluster.login_processes())
    return walls, left


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _run(lake: ClusterLake, instance: dg.DagsterInstance, keys: tuple[str, ...]) -> None:
    shutil.rmtree(lake.settings.jobs_dir / "made", ignore_errors=True)  # or nothing would be sent
    ran = run(lake, instance, "intermediates", *keys)
    assert ran.success, ran.cause


def _as_it_is(slurm: Slurm, folder: Path, instance: dg.DagsterInstance) -> None:
    """The same cluster through dagster-slurm's own client, over ssh, with the environment that is there."""
    from dagster_slurm import BashLauncher, ComputeResource, SlurmQueueConfig, SlurmResource, SSHConnectionResource

    environment = folder / "environment"
    if not environment.exists():
        (environment / "env").mkdir(parents=True)
        (environment / "env" / "bin").symlink_to(Path(sys.executable).parent)
        (environment / "activate.sh").write_text("true\n")
    payload = folder / "nothing.py"
    payload.write_text("")
    ssh = SSHConnectionResource(
        host=slurm.ssh.host, port=slurm.ssh.port, user=slurm.ssh.user, key_path=str(slurm.ssh.key),
        known_hosts_file=str(slurm.ssh.known_hosts),
    )  # fmt: skip
    compute = ComputeResource(
        mode="slurm",
        slurm=SlurmResource(
            ssh=ssh, queue=SlurmQueueConfig(partition="cpu", mem="1G", cpus=1), remote_base=str(folder)
        ),
        default_launcher=BashLauncher(),
        pre_deployed_env_path=str(environment),
    )

    @dg.asset
    def nothing(context) -> dg.MaterializeResult:  # type: ignore[no-untyped-def] # Dagster reads the annotation
        return compute.run(context=context, payload_path=str(payload)).get_materialize_result()

    with redirect_stdout(io.StringIO()):  # to which it copies the job's log
        assert dg.materialize([nothing], instance=instance).success


def shown(walls: dict[str, list[float]]) -> Table:
    """The figures as a table: medians, what is above the local median, and whether the bar is kept."""
    table = Table(title=f"nothing to compute, {usable_cores()} cores, {len(next(iter(walls.values())))} rounds")
    table.add_column("path")
    for name in ("median s", "fastest s", "above local s", "bar s"):
        table.add_column(name, justify="right")
    for name, seconds in walls.items():
        profile, _, keys = name.partition(" ")
        median = statistics.median(seconds)
        above = median - statistics.median(walls[f"local {keys}"])
        bar = BARS_S.get(profile)
        verdict = "" if bar is None else f"{bar:g}, {'kept' if above <= bar else 'missed'}"
        table.add_row(name, f"{median:.2f}", f"{min(seconds):.2f}", f"{above:.2f}", verdict)
    return table


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=default_folder(), help="folder of the cluster (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    slurm = Slurm(Cluster(Layout(arguments.dir.resolve())))
    if not slurm.cluster.running("slurmctld"):
        parser.error(f"no cluster runs in {arguments.dir}: make slurm-up")
    os.environ["SLURM_CONF"] = str(slurm.conf)
    logging.disable(logging.WARNING)  # Dagster shows every event of every run
    walls, left = measure(slurm, arguments.rounds)
    Console(width=120).print(shown(walls))
    print(f"processes left on the login node: {left}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "cluster_overhead.json"
    path.write_text(json.dumps({"cores": usable_cores(), "wall_s": walls, "processes_left": left}, indent=2))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
