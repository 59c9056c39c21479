"""The cluster that the tests below this folder run on.

`slurm` is one real single-machine cluster for the whole session. With SPATIAL_SLURM_DIR set it is the one in that
folder (`make slurm-up` starts it beforehand, and it is left running); otherwise one is started in a folder of its own
and taken down with it. Where SLURM cannot run, these tests are skipped with what to do about it; in CI they fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.client import Slurm
from tests.slurm.cluster.__main__ import READY
from tests.slurm.cluster.cluster import Cluster, ClusterError, check_possible
from tests.slurm.cluster.layout import FOLDER_VARIABLE, Layout, default_folder

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A running cluster; see `tests.slurm.client.Slurm`."""
    try:
        check_possible()
    except ClusterError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(f"{error}; then run the tests again, or `make slurm-up` to keep a cluster running between runs")
    if os.environ.get(FOLDER_VARIABLE):
        cluster = Cluster(Layout(default_folder().resolve()))
        cluster.up()
        yield Slurm(cluster)
        return
    folder = Path(tempfile.mkdtemp(prefix="spatial-slurm-"))
    argv = [sys.executable, "-m", "tests.slurm.cluster", "hold", "--dir", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, cwd=REPOSITORY, text=True, start_new_session=True, **pipes) as holder:  # type: ignore[call-overload]
        said = holder.stdout.readline().strip()
        if said != READY:
            pytest.fail(f"the test cluster did not start: {said or holder.stdout.read()}", pytrace=False)
        yield Slurm(Cluster(Layout(folder)))
        holder.stdin.close()
    assert not folder.exists(), f"{folder} is left behind by the test cluster"


@pytest.fixture(autouse=True)
def healed(slurm: Slurm) -> Iterator[None]:
    """Every test finds all daemons up, whatever the one before it broke."""
    yield
    slurm.heal()


@pytest.fixture(autouse=True, scope="module")
def emptied(slurm: Slurm) -> Iterator[None]:
    """Every module finds an empty queue; within a module, tests may share jobs that take long."""
    yield
    slurm.heal()
    slurm.cancel_everything()
