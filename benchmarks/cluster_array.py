"""How long 500 partitions of half a second take through job arrays, and what they leave on the login node.

Five runs of 100 partitions, one array each, over the login node or over ssh. A partition is the `ingest` of a tar of
two to four pictures, which takes about half a second with its Python start. While it runs, connections to the ssh
server are counted; afterwards, processes on the login node.

Starts a test cluster of its own and takes it down.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import tempfile
import threading
import time
from pathlib import Path

import dagster as dg

from benchmarks.harness import RESULTS
from spatial_core.storage.hardware import usable_cores
from tests.data.make_tars import street_view, tar_bytes
from tests.slurm.client import Slurm
from tests.slurm.cluster.cluster import Cluster
from tests.slurm.cluster.layout import Layout
from tests.slurm.lakes import ClusterLake
from tests.slurm.runs import Connections, close_connection, run

BAR_S = 150.0
CONNECTIONS_BAR = 2
KEYS_A_RUN = 100


def measure(slurm: Slurm, folder: Path, profile: str, partitions: int) -> dict[str, float]:
    """Wall seconds, CPU seconds of the Dagster side, and what was seen on the login node."""
    lake = ClusterLake(folder / f"{profile}.toml", slurm)
    lake.write(profile, resources={"intermediates": {"mem": "300M", "cpus": 1}}, poll_s=1.0, poll_max_s=30.0)
    raw = lake.settings.locations.raw_dir
    raw.mkdir(parents=True, exist_ok=True)
    keys = [f"{number:04d}" for number in range(1, partitions + 1)]
    for key in keys:
        (raw / f"{key}.tar").write_bytes(tar_bytes(street_view(int(key), 7, targets=1)))
    connections, over = Connections(slurm.ssh.port), threading.Event()
    watcher = threading.Thread(target=connections.watch, args=(over.is_set,))
    watcher.start()
    used = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("tar", keys)
        for begin in range(0, partitions, KEYS_A_RUN):
            ran = run(lake, instance, "intermediates", *keys[begin : begin + KEYS_A_RUN])
            assert ran.success, ran.cause
    wall = time.perf_counter() - began
    over.set()
    watcher.join()
    now = resource.getrusage(resource.RUSAGE_SELF)
    close_connection(lake)
    slurm.wait_for(lambda: not slurm.cluster.login_processes(), 10, what="a login node without our processes")
    return {
        "wall_s": wall,
        "dagster_cpu_s": now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime,
        "ssh_connections": connections.most,
        "processes_left": len(slurm.cluster.login_processes()),
    }


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--partitions", type=int, default=500)
    parser.add_argument("--profiles", nargs="+", default=["slurm_login", "slurm_ssh"])
    given = parser.parse_args()
    logging.disable(logging.WARNING)  # Dagster shows every event of every run
    figures = {}
    with tempfile.TemporaryDirectory(prefix="spatial-array-") as folder:
        cluster = Cluster(Layout(Path(folder) / "slurm"))
        cluster.up()
        slurm = Slurm(cluster)
        os.environ["SLURM_CONF"] = str(slurm.conf)
        try:
            for profile in given.profiles:
                place = Path(folder) / profile
                place.mkdir()
                found = measure(slurm, place, profile, given.partitions)
                figures[profile] = found
                kept = found["wall_s"] <= BAR_S and found["ssh_connections"] <= CONNECTIONS_BAR
                bars = f"{BAR_S:g} s, {CONNECTIONS_BAR} connections: {'kept' if kept else 'missed'}"
                print(f"{profile}: {found} (bars {bars})")
        finally:
            cluster.down()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "cluster_array.json"
    path.write_text(json.dumps({"cores": usable_cores(), "partitions": given.partitions, **figures}, indent=2))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
