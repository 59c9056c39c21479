"""Every end of a job, for real, as the run that asked for it sees it.

All jobs are sent at once (`cases`) and go on while the tests look at them one after another. Jobs get into trouble by
what their script does before the stage (`compute.setup`) and by what befalls jobs on a cluster (`tests.slurm.recipes`).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from spatial_core import errors
from spatial_core.cluster.ledger import Ledger
from spatial_core.config.settings import Settings
from spatial_core.jobs.registry import StageCall
from spatial_core.storage.provenance import artifact_digest
from spatial_core.street_view.ingest import ingest_tar
from tests.slurm import recipes
from tests.slurm.client import Slurm
from tests.slurm.following import END_S, Case, FollowedLake, python_that_runs

pytestmark = pytest.mark.slow
SLEEP = "sleep 300"
FIRST_TIME_SLEEP = 'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then sleep 300; fi'
SLEEP_IF_SHORT = 'if [ "$(squeue -h -j "$SLURM_JOB_ID" -o %l)" = 5:00 ]; then sleep 300; fi'
EAT_300_MIB = f"{sys.executable} -c 'import time; held = bytearray(b\"x\") * (300 << 20); time.sleep(4)'"
# A stage that fails in a way nobody expected.
CRASHING = """
import sys
from spatial_core.jobs import registry
from spatial_core.jobs.__main__ import main
def crash(**arguments):
    raise KeyError("no such column")
registry.STAGES["ingest"] = registry.Stage("__main__:crash", "1", ("tar", "output_dir"), ())
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def lake(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FollowedLake]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(slurm.conf))
        made = FollowedLake(tmp_path_factory.mktemp("lake"), slurm)
        yield made
        made.close()


@pytest.fixture(scope="module", autouse=True)
def cases(slurm: Slurm, lake: FollowedLake) -> dict[str, Case]:
    """Everything that happens on node1, sent at once, and the blows that are dealt to it."""
    crashing = python_that_runs(lake.folder, "crashing", CRASHING)
    sent = {
        "completed": lake.ingest(),
        "damaged": lake.ingest(damaged=True),
        "crashed": lake.ingest(python=crashing),
        "killed": lake.ingest("kill -9 $$"),
        "exited": lake.ingest("echo no module named cuda >&2", "exit 3"),
        "over time": lake.ingest(SLEEP),
        "over time once": lake.ingest(SLEEP_IF_SHORT, retries=1, retry_scale=2),
        "over memory": lake.ingest(EAT_300_MIB, mem="200M"),
        "over memory once": lake.ingest(EAT_300_MIB, mem="200M", retries=1, retry_scale=8),
        "cancelled running": lake.ingest(SLEEP),
        "cancelled waiting": lake.ingest(extra=("--hold",)),
        "past its deadline": lake.ingest(extra=("--exclusive",)),
        "requeued": lake.ingest(FIRST_TIME_SLEEP),
        "vanished": vanishing(slurm, lake),
        "beyond its partition": lake.ingest(time_limit="2-00:00:00"),
    }
    blows: dict[str, Callable[[Slurm, str], object]] = {
        "over time": recipes.reach_time_limit,
        "over time once": recipes.reach_time_limit,
        "cancelled running": lambda slurm, job: (slurm.wait_state(job, "RUNNING"), recipes.cancel(slurm, job)),
        "cancelled waiting": recipes.cancel,
        "past its deadline": recipes.miss_deadline,
        "requeued": recipes.requeue,
    }
    for name, blow in blows.items():
        lake.deal(partial(lambda case, blow: blow(slurm, case.job()), sent[name], blow))
    return sent


@pytest.fixture(scope="module", autouse=True)
def on_node2(slurm: Slurm, lake: FollowedLake) -> dict[str, Case]:
    """What befalls a whole node: first somebody more urgent needs it, then its power fails."""
    there = ("--nodelist=node2",)
    sent = {
        "preempted": lake.ingest(SLEEP, partition="scavenge", extra=there),
        "preempted and requeued": lake.ingest(FIRST_TIME_SLEEP, partition="scavenge_requeue", extra=there),
    }

    def blows() -> None:
        for name in ("preempted", "preempted and requeued"):
            slurm.wait_state(sent[name].job(), "RUNNING")
        slurm.wait_state(recipes.preempt(slurm, sent["preempted"].job()), "COMPLETED")
        sent["preempted and requeued"].done()
        lost = lake.ingest(SLEEP, partition="gpu")
        sent["lost and requeued"] = lake.ingest(FIRST_TIME_SLEEP, partition="gpu")
        for case in (lost, sent["lost and requeued"]):
            slurm.wait_state(case.job(), "RUNNING")
        slurm.run("scontrol", "update", f"JobId={lost.job()}", "Requeue=0")
        with recipes.power_cut(slurm, "node2"):
            lost.done()
        sent["lost"] = lost

    lake.deal(blows)
    return sent


def vanishing(slurm: Slurm, lake: FollowedLake) -> Case:
    """A job of which, between two looks, queue and accounting lose every trace."""
    tar = lake.tar()
    settings = lake.settings(extra=("--hold",), vanished_after_s=4.0)
    looked = threading.Event()

    def pause(seconds: float) -> None:
        if not looked.is_set():
            looked.set()
            slurm.cancel(case.job())
            recipes.forget(slurm, case.job())
        time.sleep(seconds)

    call = StageCall("ingest", {"tar": str(tar), "output_dir": str(lake.folder / "intermediates")}, settings)
    case = lake.follow("intermediates", tar.stem, call, pause=pause)
    return case


def test_completed(cases: dict[str, Case], lake: FollowedLake) -> None:
    case = cases["completed"]
    done = case.done()
    assert done.error is None
    assert done.report is not None
    local = ingest_tar(lake.folder / "raw" / f"{case.key}.tar", lake.folder / "local", Settings())
    assert artifact_digest(done.report.artifact) == artifact_digest(local.artifact)
    assert done.ending is not None
    assert (done.ending.state, done.ending.node, done.ending.partition) == ("COMPLETED", "node1", "cpu")
    assert done.ending.memory_asked_mb == 1500
    assert done.ending.cpu_s is not None
    assert f"{case.key}.tar" in case.watcher.text, "progress of the stage is shown while it runs"


def test_an_expected_failure_keeps_its_type_and_its_line(cases: dict[str, Case], lake: FollowedLake) -> None:
    case = cases["damaged"]
    with pytest.raises(errors.TarError) as local:
        ingest_tar(lake.folder / "raw" / f"{case.key}.tar", lake.folder / "local", Settings())
    error = case.done().error
    assert type(error) is errors.TarError
    assert str(error) == str(local.value)


def failed(case: Case, kind: type[errors.JobFailed], state: str) -> str:
    """The message of a failure, of which type and state are checked, and that nobody sent it twice."""
    done = case.done()
    assert type(done.error) is kind, done
    assert done.ending is not None
    assert done.ending.state == state
    assert Path(done.log).parts[-2] == "logs"
    assert len(case.watcher.jobs) == 1
    text = str(done.error)
    who = f" by user {os.getuid()}" if state == "CANCELLED" else ""
    assert text.startswith(f"job {case.job()} ended {state}{who} (")
    return text


def test_a_crash_shows_the_error_and_the_last_lines(cases: dict[str, Case]) -> None:
    text = failed(cases["crashed"], errors.JobFailed, "FAILED")
    assert "exit code 1" in text
    assert "KeyError: 'no such column'; last lines: " in text
    assert 'raise KeyError("no such column")' in text


def test_ended_by_a_signal_or_by_the_script_itself(cases: dict[str, Case]) -> None:
    assert "(signal 9, " in failed(cases["killed"], errors.JobFailed, "FAILED")
    text = failed(cases["exited"], errors.JobFailed, "FAILED")
    assert "(exit code 3, " in text
    assert text.endswith("last lines: no module named cuda")


def test_out_of_time(cases: dict[str, Case]) -> None:
    text = failed(cases["over time"], errors.JobTimedOut, "TIMEOUT")
    assert "ask for more time than 00:05:00 (compute.resources.intermediates.time_limit)" in text
    assert "DUE TO TIME LIMIT" in text


def test_out_of_time_is_tried_again_with_more(cases: dict[str, Case], slurm: Slurm) -> None:
    case = cases["over time once"]
    assert case.done().report is not None
    assert slurm.ended(case.job(0)).state == "TIMEOUT"
    assert slurm.ended(case.job(1)).state == "COMPLETED"
    assert "trying again with 1500M and 00:10:00" in case.watcher.text


def test_out_of_memory(cases: dict[str, Case], slurm: Slurm) -> None:
    state = "OUT_OF_MEMORY" if slurm.cluster.kills_for_memory else "FAILED"
    text = failed(cases["over memory"], errors.JobOutOfMemory, state)
    assert "ask for more memory than 200M (compute.resources.intermediates.mem)" in text


def test_out_of_memory_is_tried_again_with_more(cases: dict[str, Case], slurm: Slurm) -> None:
    case = cases["over memory once"]
    assert case.done().report is not None
    first, second = slurm.ended(case.job(0)), slurm.ended(case.job(1))
    assert (first.requested_memory, second.requested_memory) == ("200M", "1600M")
    assert (first.state == "COMPLETED", second.state) == (False, "COMPLETED")


def test_cancelled_by_somebody_else(cases: dict[str, Case]) -> None:
    failed(cases["cancelled running"], errors.JobCancelled, "CANCELLED")
    text = failed(cases["cancelled waiting"], errors.JobCancelled, "CANCELLED")
    assert "after 0 s" in text
    assert text.endswith("last lines: none")


def test_past_its_deadline(cases: dict[str, Case]) -> None:
    assert "could not end before its --deadline" in failed(cases["past its deadline"], errors.JobTimedOut, "DEADLINE")


def test_requeued_by_an_operator(cases: dict[str, Case]) -> None:
    case = cases["requeued"]
    assert case.done().report is not None
    assert len(case.watcher.jobs) == 1, "followed, not sent again"
    assert "pending (BeginTime)" in case.watcher.text


def test_vanished(cases: dict[str, Case]) -> None:
    done = cases["vanished"].done()
    assert type(done.error) is errors.JobVanished
    assert "neither the queue nor the accounting knows it" in str(done.error)


def test_preempted(on_node2: dict[str, Case]) -> None:
    text = failed(on_node2["preempted"], errors.JobPreempted, "PREEMPTED")
    assert "use a partition whose jobs are not preempted" in text
    case = on_node2["preempted and requeued"]
    assert case.done().report is not None
    assert len(case.watcher.jobs) == 1, "followed, not sent again"


def test_a_lost_node(lake: FollowedLake, on_node2: dict[str, Case]) -> None:
    for blow in lake.blows:
        blow.result(timeout=END_S)
    assert "materialize again" in failed(on_node2["lost"], errors.NodeFailed, "NODE_FAIL")
    case = on_node2["lost and requeued"]
    assert case.done().report is not None
    assert len(case.watcher.jobs) == 1, "followed, not sent again"


def test_one_that_can_never_start_fails_with_what_to_change(cases: dict[str, Case], slurm: Slurm) -> None:
    case = cases["beyond its partition"]
    error = case.done().error
    assert "could never start (PartitionTimeLimit) and was cancelled" in str(error)
    assert "--time=2-00:00:00" in str(error)
    assert slurm.ended(case.job()).state == "CANCELLED"


def test_what_is_refused_is_told_in_sbatchs_words(lake: FollowedLake) -> None:
    with pytest.raises(errors.ClusterError, match=r"the job was refused: .*invalid partition specified: nine"):
        lake.ingest(partition="nine").done()


def test_nothing_is_left_over(cases: dict[str, Case], on_node2: dict[str, Case], lake: FollowedLake) -> None:
    for case in [*cases.values(), *on_node2.values()]:
        case.done()
    assert Ledger(lake.folder / "jobs").submissions() == []
    lines = (lake.folder / "jobs" / "usage.jsonl").read_text().splitlines()
    used = [json.loads(line) for line in lines]
    assert len({(one["job"], one["start"], one["state"]) for one in used}) == len(used)
    requeued = cases["requeued"].job()
    assert [one["state"] for one in used if one["job"] == requeued] == ["REQUEUED", "COMPLETED"], "each attempt counts"
