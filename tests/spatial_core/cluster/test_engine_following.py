"""Following tasks: what the engine takes from each look, and what it does not conclude."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spatial_core.cluster.ledger import KEPT_S, Ledger
from spatial_core.errors import ClusterUnreachable, JobFailed, JobOutOfMemory, JobTimedOut, JobVanished, NodeFailed
from tests.spatial_core.cluster.simulated import Bench, Recorder


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_call_that_ends_well(bench: Bench) -> None:
    bench.cluster.step(lambda: bench.cluster.task("0201").start(), lambda: bench.succeed("0201"))
    observer = Recorder()
    (done,) = bench.run("0201", observer=observer)
    assert done.error is None
    assert done.report == bench.make("0201")
    assert done.ending is not None
    assert (done.ending.state, done.ending.node, done.ending.task_id) == ("COMPLETED", "node1", "100")
    assert observer.submitted_jobs == ["100"]
    assert Ledger(bench.settings().jobs_dir).submissions() == []


def test_outcomes_come_as_they_are_known(bench: Bench) -> None:
    bench.cluster.step(lambda: bench.succeed("0202"))
    outcomes = bench.run("0201", "0202", "0203")
    assert next(outcomes).key == "0202"
    bench.fail("0203")
    failed = next(outcomes)
    assert (failed.key, type(failed.error)) == ("0203", JobFailed)
    assert failed.log.endswith("/logs/2.log")
    bench.succeed("0201")
    assert [done.key for done in outcomes] == ["0201"]


def test_a_task_in_the_queue_has_not_ended_whatever_else_there_is(bench: Bench) -> None:
    def completing() -> None:
        bench.succeed("0201")
        task = bench.cluster.task("0201")
        task.state = "COMPLETING"

    bench.cluster.step(completing, *[lambda: None] * 20, lambda: setattr(bench.cluster.task("0201"), "state", ""))
    (done,) = bench.run("0201")
    assert done.report is not None
    assert bench.cluster.did("poll") == 22


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "COMPLETING", "REQUEUED", "SUSPENDED"])
def test_accounting_that_lags_behind_is_waited_for(state: str, bench: Bench) -> None:
    def left_the_queue() -> None:
        bench.succeed("0201")
        bench.cluster.task("0201").account = {"State": state, "ExitCode": "0:0"}

    def caught_up() -> None:
        bench.cluster.task("0201").end("COMPLETED")

    bench.cluster.step(left_the_queue, *[lambda: None] * 10, caught_up)
    (done,) = bench.run("0201", poll_max_s=1)
    assert done.report is not None
    assert bench.cluster.did("poll") == 12


def test_a_requeued_task_is_followed_to_its_end(bench: Bench) -> None:

    def started() -> None:
        bench.cluster.task("0201").start()

    def requeued() -> None:
        task = bench.cluster.task("0201")
        task.state, task.reason = "PENDING", "BeginTime"
        task.account = {"State": "NODE_FAIL", "ExitCode": "0:0"}

    bench.cluster.step(started, requeued, lambda: None, started, lambda: bench.succeed("0201"))
    observer = Recorder()
    (done,) = bench.run("0201", observer=observer)
    assert done.report is not None
    assert bench.cluster.did("submit") == 1
    assert "1 pending (BeginTime)" in observer.text()


def test_a_task_nobody_knows_any_more_is_lost_after_a_while(bench: Bench) -> None:
    def vanish() -> None:
        bench.cluster.task("0201").state = ""

    bench.cluster.step(vanish)
    (done,) = bench.run("0201", poll_max_s=10)
    assert isinstance(done.error, JobVanished)
    assert 180 < bench.cluster.now < 200


def test_silence_is_not_absence(bench: Bench) -> None:
    """Accounting has no row yet when it falls silent; that it was away for long must not count."""
    cluster = bench.cluster

    def silence() -> None:
        cluster.accounting_error = "Problem talking to the database"

    def answers() -> None:
        cluster.accounting_error = None

    cluster.step(lambda: setattr(cluster.task("0201"), "state", ""), silence, *[lambda: None] * 100, answers)
    cluster.step(*[lambda: None] * 3, lambda: bench.succeed("0201"))
    (done,) = bench.run("0201", poll_max_s=10)
    assert done.report is not None
    assert cluster.now > 900


@pytest.mark.parametrize("what", ["queue_error", "accounting_error", "unreachable"])
def test_nothing_is_concluded_from_a_scheduler_that_does_not_answer(what: str, bench: Bench) -> None:
    cluster = bench.cluster

    def away() -> None:
        bench.fail("0201", "FAILED")
        setattr(cluster, what, "no answer" if what != "unreachable" else True)

    def back() -> None:
        setattr(cluster, what, None if what != "unreachable" else False)
        bench.succeed("0201")

    cluster.step(away, *[lambda: None] * 60, back)
    observer = Recorder()
    (done,) = bench.run("0201", observer=observer)
    assert done.report is not None
    warnings = observer.text(30).splitlines()
    assert len(warnings) == 1
    assert "the scheduler does not answer" in warnings[0]
    assert "the scheduler answers again" in observer.text()


@pytest.mark.parametrize("what", ["queue_error", "accounting_error", "unreachable"])
def test_silence_for_long_ends_the_run_but_not_the_jobs(what: str, bench: Bench) -> None:
    cluster = bench.cluster

    def away() -> None:
        bench.succeed("0201")
        setattr(cluster, what, "no answer" if what != "unreachable" else True)

    cluster.step(away)
    with pytest.raises(ClusterUnreachable, match=r"has not answered for 600 s .* materialize again to follow them"):
        list(bench.run("0201", accounting_patience_s=600))
    assert cluster.cancelled == []
    setattr(cluster, what, None if what != "unreachable" else False)
    (done,) = bench.run("0201", run_id="run-2")
    assert done.report is not None
    assert cluster.did("submit") == 1


def test_what_a_task_says_is_shown_with_its_key(bench: Bench) -> None:
    def talk() -> None:
        task = bench.cluster.task("0202")
        task.start()
        task.say("log", level="WARNING", message="half\u2028way")
        task.said += "torn by a full disk\n"
        task.say("log", level="INFO", message="on")

    bench.cluster.step(talk, lambda: bench.succeed("0201"), lambda: bench.succeed("0202"))
    observer = Recorder()
    assert [done.report is not None for done in bench.run("0201", "0202", observer=observer)] == [True, True]
    assert (30, "[0202] half\u2028way") in observer.lines
    assert (20, "[0202] on") in observer.lines
    assert "100_1: not a Pipes message: 'torn by a full disk'" in observer.text(30)


def test_messages_that_are_still_on_their_way_are_waited_for(bench: Bench) -> None:
    """The stage's own failure is among them: without it the job would have crashed for no reason."""

    def end() -> None:
        task = bench.cluster.task("0201")
        task.start()
        task.tell(failure={"type": "TarError", "message": "0201.tar: damaged"})
        task.more = True
        task.end("FAILED", "1:0")

    bench.cluster.step(end, lambda: None, lambda: setattr(bench.cluster.task("0201"), "more", False))
    (done,) = bench.run("0201")
    assert (type(done.error).__name__, str(done.error)) == ("TarError", "0201.tar: damaged")


def test_looks_grow_rarer_while_nothing_happens(bench: Bench) -> None:
    bench.cluster.step(*[lambda: None] * 30, lambda: bench.cluster.task("0201").start(), lambda: bench.succeed("0201"))
    list(bench.run("0201", poll_s=1, poll_max_s=20))
    pauses = bench.cluster.pauses
    assert pauses[0] == 1
    assert pauses[2:5] == pytest.approx([1.3, 1.69, 2.197])
    assert max(pauses) == pauses[30] == 20
    assert pauses[31] == 1, "and frequent again when something does"


def test_a_thousand_states_are_one_line(bench: Bench) -> None:
    keys = [f"{number:04}" for number in range(1000)]

    def some_run() -> None:
        for key in keys[:30]:
            bench.cluster.task(key).state = "RUNNING"

    def all_end() -> None:
        for key in keys:
            bench.cluster.task(key).end("CANCELLED by 7")

    bench.cluster.step(some_run, lambda: None, all_end)
    observer = Recorder()
    assert len(list(bench.run(*keys, observer=observer))) == 1000
    assert [line for line in observer.text().splitlines() if "pending" in line] == [
        "job 100: 970 pending (Priority), 30 running"
    ]
    assert bench.cluster.did("tail") == 1


def test_what_a_task_used_is_kept_once(bench: Bench) -> None:
    bench.cluster.step(lambda: (bench.succeed("0201"), bench.fail("0202"))[0])
    list(bench.run("0201", "0202", cost_per_cpu_hour=400.0))
    lines = (bench.settings().jobs_dir / "usage.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(found["partition_key"], found["state"], found["cost"]) for found in records] == [
        ("0201", "COMPLETED", 1.0),
        ("0202", "FAILED", 1.0),
    ]


def test_folders_of_what_went_well_go_some_time_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.cluster.step(lambda: (bench.succeed("0201"), bench.succeed("0202"))[0])
    list(bench.run("0201", "0202"))
    bench.cluster.step(lambda: (bench.succeed("0203"), bench.fail("0204"))[0])
    list(bench.run("0203", "0204"))
    assert bench.cluster.removed == [], "another run may still read its messages"
    from spatial_core.cluster import ledger

    later = ledger.now() + KEPT_S + 1
    monkeypatch.setattr(ledger, "now", lambda: later)
    bench.cluster.step(lambda: bench.succeed("0205"))
    list(bench.run("0205"))
    names = [job.name for job in bench.cluster.jobs.values()]
    assert [Path(folder).name for folder in bench.cluster.removed] == [names[0]], "the log of a failure stays"


@pytest.mark.parametrize("reason", ["PartitionTimeLimit", "QOSMaxWallDurationPerJobLimit"])
def test_a_task_that_can_never_start_fails_with_what_to_change(reason: str, bench: Bench) -> None:
    bench.cluster.step(lambda: setattr(bench.cluster.task("0202"), "reason", reason))
    bench.cluster.step(lambda: bench.succeed("0201"))
    first, second = bench.run("0201", "0202", partition="short", poll_max_s=5)
    assert first.report is not None
    assert f"100_1 could never start ({reason}) and was cancelled" in str(second.error)
    assert "--partition=short" in str(second.error)
    assert "--time=02:00:00" in str(second.error)
    assert bench.cluster.cancelled == ["0202"]
    assert 120 < bench.cluster.now < 150


@pytest.mark.parametrize(
    "reason", ["Priority", "Resources", "JobHeldUser", "QOSMaxJobsPerUserLimit", "ReqNodeNotAvail"]
)
def test_other_reasons_are_waited_out(reason: str, bench: Bench) -> None:
    bench.cluster.step(lambda: setattr(bench.cluster.task("0201"), "reason", reason))
    bench.cluster.step(*[lambda: None] * 100, lambda: bench.succeed("0201"))
    (done,) = bench.run("0201")
    assert done.report is not None
    assert bench.cluster.now > 2000


def test_another_runs_task_that_can_never_start_is_left_to_that_run(bench: Bench) -> None:
    bench.abandon("0201", run_id="other")
    bench.cluster.task("0201").reason = "PartitionTimeLimit"
    bench.cluster.step(*[lambda: None] * 50, lambda: bench.succeed("0201"))
    (done,) = bench.run("0201", observer=Recorder(running={"other"}), run_id="run-2")
    assert done.report is not None
    assert bench.cluster.cancelled == []


@pytest.mark.parametrize("reason", ["launch failed requeued held", "launch_failed_requeued_held", "JobHoldMaxRequeue"])
def test_a_task_that_slurm_has_given_up_is_sent_again_once(reason: str, bench: Bench) -> None:
    def given_up() -> None:
        bench.cluster.task("0201").reason = reason

    bench.cluster.step(given_up, lambda: None, lambda: bench.succeed("0201"))
    (done,) = bench.run("0201")
    assert done.report is not None
    assert (bench.cluster.cancelled, bench.cluster.did("submit")) == (["0201"], 2)
    bench.cluster.step(given_up, lambda: None, given_up)
    bench.cluster.jobs.clear()
    bench.artifact("0201").unlink()
    (done,) = bench.run("0201")
    assert type(done.error) is NodeFailed
    assert f"could not be started ({reason}) and was cancelled" in str(done.error)
    assert len(bench.cluster.jobs) == 2


@pytest.mark.parametrize("learns", [True, False])
def test_accounting_is_given_time_to_learn_what_a_short_job_had_asked_for(learns: bool, bench: Bench) -> None:
    """Memory that was asked for decides whether a job was killed for using more."""
    killed = {"MaxRSS": "4200M", "NodeList": "node1"}

    def ended() -> None:
        bench.fail("0201", "FAILED", "0:9", **killed, Partition="", ReqMem="16?")

    def learnt() -> None:
        if learns:
            bench.cluster.task("0201").end("FAILED", "0:9", **killed)

    bench.cluster.step(ended, learnt)
    (done,) = bench.run("0201", poll_max_s=1)
    assert type(done.error) is (JobOutOfMemory if learns else JobFailed)
    assert (bench.cluster.now > 10) is not learns


def stop_and_requeue(bench: Bench, reached: str) -> None:
    """The job is told to stop, saves, and queues itself again."""
    task = bench.cluster.task("0201")
    task.start()
    task.tell(interrupted={"type": "Interrupted", "message": reached})
    task.state, task.reason = "PENDING", "BeginTime"


def test_a_job_that_queues_itself_again_without_getting_further_is_ended(bench: Bench) -> None:
    bench.cluster.step(*[lambda: stop_and_requeue(bench, "3 of 9 pieces are finished")] * 50)
    (done,) = bench.run("0201")
    assert type(done.error) is JobTimedOut
    assert "told to stop 5 times at the same place and was cancelled (3 of 9 pieces are finished)" in str(done.error)
    assert "ask for more time than 02:00:00" in str(done.error)
    assert (bench.cluster.cancelled, bench.cluster.did("submit")) == (["0201"], 1)


def test_one_that_gets_further_each_time_goes_on(bench: Bench) -> None:
    bench.cluster.step(*[lambda n=n: stop_and_requeue(bench, f"{n // 3} of 9") for n in range(27)])  # type: ignore[misc]
    bench.cluster.step(lambda: bench.succeed("0201"))
    (done,) = bench.run("0201")
    assert done.report is not None
    assert bench.cluster.did("submit") == 1
