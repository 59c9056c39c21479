"""What a person and a machine room do to runs whose work is on the cluster: through the real webserver and daemon."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml

from spatial_core.cluster.ledger import Ledger
from tests.dagster_server import ROOT, Server
from tests.slurm.client import Slurm
from tests.slurm.lakes import REPOSITORY, ClusterLake

pytestmark = pytest.mark.slow
KEYS = ["0901", "0902", "0903"]
NAME = "spatial-intermediates-"


@pytest.fixture(scope="module")
def lake(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> ClusterLake:
    """Three tars. Jobs of `intermediates` wait as long as the file `hold` exists."""
    folder = tmp_path_factory.mktemp("lake")
    made = ClusterLake(folder / "config.toml", slurm)
    hold = folder / "hold"
    waiting = f"while [ -e {hold} ]; do sleep 0.2; done"
    # Only one at a time, so that one task runs while the others are pending.
    made.write(setup=[f"export PYTHONPATH={REPOSITORY}", waiting], max_parallel=1)
    made.draw_city()
    return made


@pytest.fixture
def hold(lake: ClusterLake) -> Iterator[Path]:
    """Jobs wait until the file is gone; what was made before is gone too."""
    at = lake.settings.locations
    for folder in (at.intermediates_dir, at.fingerprints_dir, at.embeddings_dir):
        shutil.rmtree(folder, ignore_errors=True)
    path = lake.config.parent / "hold"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def server(slurm: Slurm, lake: ClusterLake, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real thing, but looking after lost runs every five seconds."""
    home = tmp_path_factory.mktemp("home")
    options = yaml.safe_load((ROOT / "dagster_home" / "dagster.yaml").read_text())
    options["run_monitoring"] |= {"poll_interval_seconds": 5, "free_slots_after_run_end_seconds": 5}
    (home / "dagster.yaml").write_text(yaml.safe_dump(options))
    running = Server(home, lake.config, {"SLURM_CONF": str(slurm.conf)})
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


def submitted(slurm: Slurm, since: float) -> set[str]:
    """Arrays for the asset that were submitted since then."""
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since))
    rows = slurm.run("sacct", "-n", "-P", "-X", "-S", start, "--format=JobID,JobName,Submit").splitlines()
    found = [row.split("|") for row in rows]
    return {job.partition("_")[0] for job, name, at in found if name.startswith(NAME) and at >= start}


def jobs(slurm: Slurm, state: str = "all") -> list[str]:
    """Tasks for the asset in the queue; `%F` is the array's id."""
    rows = slurm.run("squeue", "-h", "-r", *(["-t", state] if state != "all" else []), "-o", "%F %j").splitlines()
    return [row.split()[0] for row in rows if row.split()[1].startswith(NAME)]


def started_run(server: Server, *, not_these: Iterable[str] = ()) -> str | None:
    """A run that makes the asset and is at work."""
    runs = [run for run in server.runs() if run["status"] == "STARTED" and run["runId"] not in set(not_these)]
    return next((run["runId"] for run in runs if "cluster_job/intermediates" in run["tags"]), None)


def status(server: Server, run_id: str) -> str:
    return next(run["status"] for run in server.runs() if run["runId"] == run_id)


def test_terminate_cancels_what_runs_and_what_waits(
    slurm: Slurm, lake: ClusterLake, server: Server, hold: Path
) -> None:
    """The daemon itself asked for the new partitions."""
    server.wait("job", lambda: jobs(slurm, "RUNNING"))
    assert len(jobs(slurm)) == len(KEYS), "one task runs, two wait"
    (job,) = set(jobs(slurm))
    run = server.wait("run", lambda: started_run(server))
    begun = time.monotonic()
    server.terminate(run)
    slurm.wait_for(lambda: not jobs(slurm), 30, what="an empty queue")
    assert time.monotonic() - begun < 15
    slurm.wait_for(lambda: {row.state for row in slurm.accounted(job) if "." not in row.id} == {"CANCELLED"}, 30)
    server.wait("end", lambda: status(server, run) == "CANCELED")
    assert Ledger(lake.settings.jobs_dir).submissions() == []
    assert server.made()["intermediates"] == set()


def test_a_killed_worker_costs_nothing(slurm: Slurm, lake: ClusterLake, server: Server, hold: Path) -> None:
    since = time.time()
    server.backfill("intermediates", KEYS)
    server.wait("job", lambda: jobs(slurm, "RUNNING"))
    run = server.wait("run", lambda: started_run(server))
    server.worker(run).kill()
    server.wait("loss noticed", lambda: status(server, run) == "FAILURE")
    server.wait("another run", lambda: started_run(server, not_these=[run]))
    hold.unlink()
    server.wait("artifacts", lambda: server.made(failures=True)["intermediates"] == set(KEYS))
    assert len(submitted(slurm, since)) == 1, "the jobs were followed, not sent again"
    settled(server, lake)


def test_a_restarted_host_finds_its_jobs_again(slurm: Slurm, lake: ClusterLake, server: Server, hold: Path) -> None:
    since = time.time()
    server.backfill("intermediates", KEYS)
    server.wait("job", lambda: jobs(slurm, "RUNNING"))
    run = server.wait("run", lambda: started_run(server))
    server.kill()
    hold.unlink()
    slurm.wait_for(lambda: not jobs(slurm), 120, what="jobs that end without Dagster")
    server.start()
    server.wait_ready()
    server.wait("loss noticed", lambda: status(server, run) == "FAILURE")
    server.wait("another run", lambda: any(made_by(server, run)))
    assert len(submitted(slurm, since)) == 1, "what finished meanwhile was recorded, not made again"
    settled(server, lake)


def made_by(server: Server, lost: str) -> list[str]:
    """Runs after the lost one that made the asset."""
    runs = [run["runId"] for run in server.runs()]
    later = runs[: runs.index(lost)]
    return [run["runId"] for run in server.runs() if run["runId"] in later and run["status"] == "SUCCESS"]


def settled(server: Server, lake: ClusterLake) -> None:
    """Nothing of the asset is left in the ledger."""
    ledger = Ledger(lake.settings.jobs_dir)
    server.wait("ledger", lambda: not [s for s in ledger.submissions() if s.asset == "intermediates"])
