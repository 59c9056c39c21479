"""`python -m tests.slurm.cluster up | down | status | start NAME | stop NAME | hold`: the cluster from a shell.

`hold` is what the tests use: it starts a cluster, says so, and takes it down with its folder when its standard input
ends, which also happens when the tests are killed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from tests.slurm.cluster.cluster import Cluster, ClusterError, check_possible
from tests.slurm.cluster.layout import DAEMONS, FOLDER_VARIABLE, Layout, default_folder

READY = "ready"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.cluster", description=__doc__)
    parser.add_argument("command", choices=("up", "down", "status", "start", "stop", "hold"))
    parser.add_argument("daemon", nargs="?", choices=DAEMONS, help="for start and stop")
    parser.add_argument("--dir", type=Path, default=default_folder(), help=f"folder (${FOLDER_VARIABLE}, %(default)s)")
    parser.add_argument("--clean", action="store_true", help="down: remove the folder too")
    arguments = parser.parse_args()
    if arguments.command in {"start", "stop"} and arguments.daemon is None:
        parser.error(f"{arguments.command} needs one of {', '.join(DAEMONS)}")
    if arguments.command in {"down", "status", "stop"} and not arguments.dir.exists():
        _say(f"no cluster was ever started in {arguments.dir}")
        return 0
    try:
        check_possible()
        cluster = Cluster(Layout(arguments.dir.resolve()))
        if arguments.command == "hold":
            _hold(cluster)
        elif arguments.command == "up":
            cluster.up()
            _say(f"export SLURM_CONF={cluster.layout.conf}  # then sbatch, squeue, sacct as anywhere")
        elif arguments.command == "down":
            cluster.down()
            if arguments.clean:
                shutil.rmtree(cluster.layout.root, ignore_errors=True)
        elif arguments.command == "status":
            for name in DAEMONS:
                _say(f"{name:10} {'runs' if cluster.running(name) else 'is down'}")
        else:
            getattr(cluster, arguments.command)(arguments.daemon)
    except ClusterError as error:
        _say(str(error))
        return 1
    return 0


def _hold(cluster: Cluster) -> None:
    try:
        cluster.up()
        _say(READY)
        sys.stdin.read()
    finally:
        cluster.down()
        shutil.rmtree(cluster.layout.root)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
