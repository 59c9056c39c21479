"""One partition of an asset as one job, through the hardened dagster-slurm client, on a real cluster."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest

from spatial_assets.compute.cluster import scheduler_for
from spatial_core.cluster.accounting import account_for_given_up
from spatial_core.cluster.ledger import Ledger
from tests.slurm import recipes
from tests.slurm.client import Slurm
from tests.slurm.lakes import MODEST, REPOSITORY, ClusterLake
from tests.slurm.runs import Connections, close_connection, first_job, run, sent, worker
from tests.slurm.worker import open_instance

NAMES = {
    "slurm_job_id", "slurm_state", "slurm_exit_code", "elapsed_seconds", "node_hours", "slurm_tres_accounting",
    "job_node", "job_accounting",
}  # fmt: skip


@pytest.fixture(scope="module")
def city(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw tars."""
    lake = ClusterLake(tmp_path_factory.mktemp("city") / "config.toml", slurm)
    lake.write("local")
    lake.draw_city()
    return lake.settings.locations.raw_dir


@pytest.fixture
def lake(slurm: Slurm, city: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterLake:
    """A lake that holds nothing but tars, on this host as login node."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    made = ClusterLake(tmp_path / "config.toml", slurm)
    made.write()
    shutil.copytree(city, made.settings.locations.raw_dir)
    return made


@pytest.fixture
def instance(lake: ClusterLake, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance on disk, which a worker shares."""
    with open_instance(tmp_path / "dagster") as made:
        made.add_dynamic_partitions("tar", [path.stem for path in lake.settings.locations.raw_dir.glob("*.tar")])
        yield made


@pytest.fixture
def in_background() -> Iterator[Callable[[Callable[[], object]], threading.Thread]]:
    """Something that happens while the test waits for a run."""
    threads: list[threading.Thread] = []

    def start(work: Callable[[], object]) -> threading.Thread:
        threads.append(threading.Thread(target=work))
        threads[-1].start()
        return threads[-1]

    yield start
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()


def setup(*lines: str) -> list[str]:
    """What jobs do before their command."""
    return [f"export PYTHONPATH={REPOSITORY}", *lines]


def gate(path: Path) -> list[str]:
    """Jobs wait until a file appears."""
    return setup(f"until [ -e {path} ]; do sleep 0.2; done")


@pytest.mark.parametrize("profile", ["slurm_login", "slurm_ssh"])
def test_the_artifact_is_the_local_one(
    *, profile: str, lake: ClusterLake, slurm: Slurm, instance, monkeypatch: pytest.MonkeyPatch, in_background, tmp_path
) -> None:
    lake.write(profile, setup=setup("sleep 2"))  # accounting looks at the memory once a second
    if profile == "slurm_ssh":
        monkeypatch.delenv("SLURM_CONF")  # what is known here must not matter
    connections, over = Connections(slurm.ssh.port), threading.Event()
    watcher = in_background(lambda: connections.watch(over.is_set))
    try:
        ran = run(lake, instance, "intermediates", "0901")
        left = slurm.cluster.login_processes()
    finally:
        over.set()
        watcher.join()
        close_connection(lake)
    assert ran.success
    assert set(ran.metadata) >= NAMES | {"sha256", "max_memory_mb", "cpu_efficiency_pct"}
    assert ran.metadata["slurm_state"] == "COMPLETED"
    assert ran.metadata["slurm_job_id"] == first_job(slurm, tmp_path)
    assert any("0901.tar" in line for line in ran.lines)
    assert left == [], "nothing of ours stays on the login node"
    assert connections.most <= (2 if profile == "slurm_ssh" else 0)
    made_there = lake.digests()
    shutil.rmtree(lake.settings.locations.intermediates_dir)
    lake.write("local")
    assert run(lake, instance, "intermediates", "0901").success
    assert lake.digests() == made_there


def test_a_crash_and_too_much_memory_have_their_names_and_figures(
    lake: ClusterLake, slurm: Slurm, instance, tmp_path: Path
) -> None:
    lake.write(setup=["echo last words >&2", "kill -SEGV $$"])
    ran = run(lake, instance, "intermediates", "0901")
    assert ran.cause.startswith("JobFailed: job ")
    assert "signal 11" in ran.cause
    assert ran.cause.endswith("last lines: last words")
    assert set(ran.metadata) >= NAMES
    assert Path(ran.metadata["job_log"]).read_text() == "last words\n"

    lake.write(setup=[shlex.join(recipes.eats(400))], resources={"intermediates": {**MODEST, "mem": "64M"}})
    ran = run(lake, instance, "intermediates", "0901")
    assert ran.cause.startswith("JobOutOfMemory: job ")
    assert "compute.resources.intermediates.mem" in ran.cause
    assert set(ran.metadata) >= NAMES

    lake.write()
    assert run(lake, instance, "intermediates", "0901").success, "a job that failed blocks nothing"
    slurm.wait_for(lambda: len(sent(slurm, tmp_path)) == 3, what="three jobs, for sacct lists them a second late")


def test_reaching_the_time_limit_is_named(
    lake: ClusterLake, slurm: Slurm, instance, in_background, tmp_path: Path
) -> None:
    # Too short for a warning before its end, of which the shell would die.
    lake.write(setup=["sleep 300"], resources={"intermediates": {**MODEST, "time_limit": "00:05:00"}})
    in_background(lambda: recipes.reach_time_limit(slurm, first_job(slurm, tmp_path)))
    ran = run(lake, instance, "intermediates", "0901")
    assert ran.cause.startswith("JobTimedOut: job ")
    assert ran.metadata["slurm_state"] == "TIMEOUT"


def test_an_asset_without_partitions_that_fails_says_where(
    lake: ClusterLake, slurm: Slurm, instance, tmp_path: Path
) -> None:
    """Its inputs are missing: an expected failure, raised on the node."""
    ran = run(lake, instance, "merged_splits")
    assert ran.cause.startswith(("InputError: ", "ArtifactError: "))
    assert set(ran.metadata) >= NAMES
    assert ran.metadata["slurm_job_id"] == first_job(slurm, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_a_lost_worker_leaves_its_job_to_the_next_run_of_its_partition(
    *, number: signal.Signals, lake: ClusterLake, slurm: Slurm, instance, in_background, tmp_path: Path
) -> None:
    """The job waits until the next run is seen to follow it, so that it cannot have been sent again."""
    opened = tmp_path / "opened"
    waits = ClusterLake(tmp_path / "waits.toml", slurm)
    waits.write(setup=gate(opened))
    with worker(waits, tmp_path / "dagster", "intermediates", "0901") as process:
        lost = first_job(slurm, tmp_path)
        slurm.wait_state(lost, "RUNNING")
        process.send_signal(number)
        process.wait(60)
    assert slurm.state(lost) == "RUNNING"

    other = run(lake, instance, "intermediates", "0902")
    assert other.success
    assert other.metadata["slurm_job_id"] != lost, "another partition has a job of its own"

    earlier = {made.run_id for made in instance.get_runs()}

    def open_when_followed() -> None:
        def followers() -> bool:
            tagged = instance.get_runs(dg.RunsFilter(tags={"dagster_slurm/job_id": lost}))
            return any(made.run_id not in earlier for made in tagged)

        try:
            slurm.wait_for(followers, what="a run that follows the lost one's job")
        finally:
            opened.touch()

    in_background(open_when_followed)
    again = run(waits, instance, "intermediates", "0901")
    assert again.success
    assert again.metadata["slurm_job_id"] == lost
    assert Path(again.metadata["path"]).name == "0901.parquet"
    assert len(sent(slurm, tmp_path)) == 2, "nothing was sent twice"


@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
def test_termination_cancels_within_seconds(
    state: str, lake: ClusterLake, slurm: Slurm, instance, tmp_path: Path
) -> None:
    held = {"extra": ["--hold"]} if state == "PENDING" else {}
    lake.write(setup=gate(tmp_path / "never"), resources={"intermediates": {**MODEST, **held}})
    with worker(lake, tmp_path / "dagster", "intermediates", "0901") as process:
        job = first_job(slurm, tmp_path)
        slurm.wait_state(job, state)
        (terminated,) = instance.get_runs()
        instance.report_run_canceling(terminated)
        os.kill(process.pid, signal.SIGINT)
        began = time.monotonic()
        slurm.wait_for(lambda: slurm.state(job) == "CANCELLED", 30, what="the end of the job", every_s=0.1)
        assert time.monotonic() - began < 10
        process.wait(60)
    assert Ledger(lake.settings.jobs_dir).submissions() == []
    scheduler = scheduler_for(lake.settings, print)
    slurm.wait_for(lambda: account_for_given_up(lake.settings, scheduler), 30, what="the figures of the job")
    used = json.loads(lake.settings.locations.usage_file.read_text())
    assert (used["job"], used["state"], used["partition_key"]) == (job, "CANCELLED", "0901")
    assert bool(used["node"]) is (state == "RUNNING")
