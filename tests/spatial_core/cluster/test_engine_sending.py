"""Each request is on the cluster once: several runs, lost answers, dead runs, cancellation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spatial_core import errors
from spatial_core.cluster import sending
from spatial_core.cluster.ledger import Ledger, now
from spatial_core.cluster.scheduler import UnclearSubmission
from spatial_core.config.settings import Settings
from spatial_core.jobs.registry import StageCall
from tests.spatial_core.cluster.simulated import Bench, Recorder


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def ledger(bench: Bench) -> Ledger:
    return Ledger(bench.settings().jobs_dir)


def test_two_runs_that_want_the_same_share_one_job(bench: Bench) -> None:
    first = bench.engine(Recorder(), run_id="run-1")
    outcomes = first.run(bench.calls("0201", "0202"))
    bench.cluster.step(lambda: bench.succeed("0202"))
    assert next(outcomes).key == "0202"
    second = Recorder(running={"run-1"})
    bench.cluster.step(lambda: bench.succeed("0203"), lambda: bench.succeed("0201"))
    found = {done.key: done for done in bench.run("0201", "0203", observer=second, run_id="run-2")}
    assert {key for key, done in found.items() if done.report is not None} == {"0201", "0203"}
    assert [done.key for done in outcomes] == ["0201"]
    assert [[task.key for task in job.tasks] for job in bench.cluster.jobs.values()] == [["0201", "0202"], ["0203"]]
    assert (second.attached, second.submitted_jobs) == (["100"], ["101"])
    assert ledger(bench).submissions() == []
    usage = (bench.settings().jobs_dir / "usage.jsonl").read_text()
    assert usage.count('"partition_key": "0201"') == 1


def test_other_inputs_settings_or_keys_are_other_requests(bench: Bench) -> None:
    bench.abandon("0201", run_id="dead")
    settings = Settings(process_tar={"row_group_size": 7}, base_dir=bench.folder)  # type: ignore[arg-type]
    calls = {"0201": StageCall("ingest", bench.calls("0201")["0201"].arguments, settings)}
    bench.cluster.step(lambda: bench.succeed("0201"))
    (done,) = bench.engine(run_id="run-2").run(calls)
    assert done.report is not None
    assert bench.cluster.did("submit") == 2


@pytest.mark.parametrize("alive", [False, True])
def test_jobs_of_a_dead_run_for_other_settings_are_ended_and_accounted_for(bench: Bench, alive: bool) -> None:
    bench.abandon("0201", "0202", run_id="earlier")
    bench.cluster.task("0201").start()
    settings = Settings(process_tar={"row_group_size": 7}, base_dir=bench.folder)  # type: ignore[arg-type]
    calls = {"0201": StageCall("ingest", bench.calls("0201")["0201"].arguments, settings)}
    bench.cluster.step(lambda: bench.succeed("0201"))
    observer = Recorder(running={"earlier"} if alive else set())
    (done,) = bench.engine(observer, run_id="run-2").run(calls)
    assert done.report is not None
    assert bench.cluster.cancelled == ([] if alive else ["0201"])
    assert ("[0201] job 100_0 of an earlier run was for other inputs" in observer.text()) is not alive
    (left,) = ledger(bench).submissions()
    assert [task.key for task in left.open_tasks] == (["0201", "0202"] if alive else ["0202"])
    states = [json.loads(line)["state"] for line in bench.settings().locations.usage_file.read_text().splitlines()]
    assert sorted(states) == (["COMPLETED"] if alive else ["CANCELLED", "COMPLETED"])


def test_jobs_for_another_lake_are_let_be(bench: Bench) -> None:
    bench.abandon("0201", run_id="dead")
    arguments = bench.calls("0201")["0201"].arguments | {"output_dir": str(bench.folder / "elsewhere")}
    calls = {"0201": StageCall("ingest", arguments, bench.settings())}
    bench.cluster.step(lambda: bench.succeed("0201"))
    (done,) = bench.engine(run_id="run-2").run(calls)
    assert done.report is not None
    assert bench.cluster.cancelled == []
    assert len(ledger(bench).submissions()) == 1


def test_a_dead_runs_jobs_are_taken_over(bench: Bench) -> None:
    bench.abandon("0201", "0202", run_id="dead")
    observer = Recorder()
    bench.cluster.step(lambda: bench.succeed("0201"), lambda: bench.succeed("0202"))
    found = list(bench.run("0201", "0202", observer=observer, run_id="run-2"))
    assert [done.report is not None for done in found] == [True, True]
    assert bench.cluster.did("submit") == 1
    assert observer.attached == ["100"]
    assert ledger(bench).submissions() == []


def test_what_is_taken_over_is_ones_own(bench: Bench) -> None:
    """It is cancelled with the run, and a failure is the run's own failure."""
    bench.abandon("0201", "0202", run_id="dead")
    engine = bench.engine(run_id="run-2")
    outcomes = engine.run(bench.calls("0201", "0202"))
    bench.cluster.step(lambda: bench.fail("0201"))
    assert type(next(outcomes).error) is errors.JobFailed
    assert ledger(bench).submissions()[0].run_id == "run-2"
    engine.cancel()
    assert bench.cluster.cancelled == ["0202"]
    assert ledger(bench).submissions() == []


def test_what_ended_well_while_nobody_looked_is_recorded(bench: Bench) -> None:
    bench.abandon("0201", run_id="dead")
    bench.succeed("0201")
    (done,) = bench.run("0201", run_id="run-2")
    assert done.report is not None
    assert bench.cluster.did("submit") == 1


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED by 0", "OUT_OF_MEMORY", "NODE_FAIL"])
def test_what_ended_badly_while_nobody_looked_is_sent_again(state: str, bench: Bench) -> None:
    bench.abandon("0201", "0202", run_id="dead")
    bench.succeed("0201")
    bench.fail("0202", state)
    bench.cluster.step(lambda: bench.succeed("0202"))
    found = list(bench.run("0201", "0202", run_id="run-2"))
    assert sorted(done.key for done in found if done.report is not None) == ["0201", "0202"]
    assert [[task.key for task in job.tasks] for job in bench.cluster.jobs.values()] == [["0201", "0202"], ["0202"]]


def test_a_job_too_young_for_accounting_is_followed(bench: Bench) -> None:
    bench.abandon("0201", run_id="dead")
    bench.cluster.task("0201").state = ""
    bench.cluster.step(lambda: None, lambda: None, lambda: bench.succeed("0201"))
    (done,) = bench.run("0201", run_id="run-2")
    assert done.report is not None
    assert bench.cluster.did("submit") == 1


def test_one_that_was_lost_long_ago_is_sent_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.abandon("0201", run_id="dead")
    bench.cluster.jobs.clear()
    later = now() + 1000
    monkeypatch.setattr(sending, "now", lambda: later)
    bench.cluster.step(lambda: None, lambda: bench.succeed("0201"))
    (done,) = bench.run("0201", run_id="run-2")
    assert done.report is not None
    assert bench.cluster.did("submit") == 2


@pytest.mark.parametrize("silent", ["queue_error", "accounting_error"])
def test_while_the_scheduler_is_silent_nothing_is_sent_again(silent: str, bench: Bench) -> None:
    bench.abandon("0201", run_id="dead")
    bench.fail("0201")
    setattr(bench.cluster, silent, "no answer")

    def answers() -> None:
        setattr(bench.cluster, silent, None)
        bench.succeed("0201")

    bench.cluster.step(lambda: None, lambda: None, answers)
    (done,) = bench.run("0201", run_id="run-2")
    assert done.report is not None
    assert bench.cluster.did("submit") == 1


def test_a_lost_answer_of_sbatch_costs_nothing(bench: Bench) -> None:
    bench.cluster.lose_answer = True
    bench.cluster.step(lambda: bench.succeed("0201"))
    (done,) = bench.run("0201")
    assert done.report is not None
    assert bench.cluster.did("submit") == 1


def unclear(bench: Bench) -> None:
    """A submission whose answer was lost, and accounting is away: nobody knows whether there is a job."""
    bench.cluster.lose_answer = True
    bench.cluster.accounting_error = "no answer"
    with pytest.raises(UnclearSubmission):
        list(bench.run("0201", accounting_patience_s=30))
    bench.cluster.lose_answer, bench.cluster.accounting_error = False, None
    assert [record.job for record in ledger(bench).submissions()] == [None]


def test_the_next_run_finds_the_job_by_its_name(bench: Bench) -> None:
    unclear(bench)
    bench.succeed("0201")
    (done,) = bench.run("0201", run_id="run-2")
    assert done.report is not None
    assert bench.cluster.did("submit") == 1


def test_a_submission_that_never_took_place_is_made_after_a_while(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    unclear(bench)
    bench.cluster.jobs.clear()
    begun = now()
    monkeypatch.setattr(sending, "now", lambda: begun + bench.cluster.now)
    waited_from = bench.cluster.now
    bench.cluster.step(lambda: None, lambda: bench.succeed("0201"))
    (done,) = bench.run("0201", run_id="run-2")
    assert done.report is not None
    assert bench.cluster.did("submit") == 2
    assert bench.cluster.now - waited_from > sending.INTENT_S - 40, "its job might still have turned up"


def test_a_refusal_leaves_nothing_to_look_for(bench: Bench) -> None:
    bench.cluster.refusal = "Invalid account or account/partition combination specified"
    with pytest.raises(errors.ClusterError, match="the job was refused: Invalid account"):
        list(bench.run("0201"))
    assert ledger(bench).submissions() == []


def test_many_tasks_are_several_arrays(bench: Bench) -> None:
    keys = [f"{number:04}" for number in range(1200)]

    def all_end() -> None:
        for key in keys:
            bench.cluster.task(key).end("CANCELLED by 7")

    bench.cluster.step(all_end)
    assert sorted(done.key for done in bench.run(*keys)) == keys
    assert [job.option("array") for job in bench.cluster.jobs.values()] == ["0-999%50", "0-199%50"]


def test_a_refusal_after_some_were_taken_fails_the_others_alone(bench: Bench) -> None:
    keys = [f"{number:04}" for number in range(1001)]
    taken = bench.cluster._submit

    def limited(request: object) -> dict[str, object]:
        bench.cluster.refusal = "Job violates accounting/QOS policy" if bench.cluster.jobs else None
        return taken(request)  # type: ignore[arg-type]

    bench.cluster._submit = limited  # type: ignore[method-assign, assignment]

    def all_end() -> None:
        for key in keys[:1000]:
            bench.cluster.task(key).end("CANCELLED by 7")

    bench.cluster.step(all_end)
    found = {done.key: done.error for done in bench.run(*keys)}
    assert len(found) == 1001
    assert "violates accounting/QOS policy" in str(found["1000"])
    assert {type(found[key]) for key in keys[:1000]} == {errors.JobCancelled}


def test_cancelling_takes_everything_of_this_run_and_nothing_of_others(bench: Bench) -> None:
    bench.abandon("0201", run_id="other")
    engine = bench.engine(Recorder(running={"other"}), run_id="run-2")
    outcomes = engine.run(bench.calls("0201", "0202", "0203"))
    bench.cluster.step(lambda: bench.succeed("0202"))
    next(outcomes)
    engine.cancel()
    assert bench.cluster.cancelled == ["0203"]
    assert [record.run_id for record in ledger(bench).submissions()] == ["other"]


def test_a_job_is_cancelled_although_its_run_was_stopped_before_it_knew_of_it(bench: Bench) -> None:
    class Told(Recorder):
        def submitted(self, submission: object, *, attached: bool) -> None:
            raise KeyboardInterrupt

    engine = bench.engine(Told())
    with pytest.raises(KeyboardInterrupt):
        list(engine.run(bench.calls("0201")))
    engine.cancel()
    assert bench.cluster.cancelled == ["0201"]
    assert ledger(bench).submissions() == []


def test_a_job_that_may_exist_is_not_forgotten_by_cancelling(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    unclear(bench)
    (record,) = ledger(bench).submissions()
    scheduler = bench.engine()._scheduler
    taken = dict(bench.cluster.jobs)
    bench.cluster.jobs.clear()
    with pytest.raises(UnclearSubmission, match="not known yet"):
        sending.cancel_submission(record, scheduler, ledger(bench))
    bench.cluster.jobs.update(taken)
    assert sending.cancel_submission(record, scheduler, ledger(bench)) == 1
    assert bench.cluster.cancelled == ["0201"]
    unclear(bench)
    (record,) = ledger(bench).submissions()
    bench.cluster.jobs.clear()
    later = now() + sending.INTENT_S + 1
    monkeypatch.setattr(sending, "now", lambda: later)
    assert sending.cancel_submission(record, scheduler, ledger(bench)) == 0
    assert ledger(bench).submissions() == []


def test_cancelling_while_the_scheduler_is_away_forgets_nothing(bench: Bench) -> None:
    bench.abandon("0201", run_id="run-1")
    bench.cluster.queue_error = "Unable to contact slurm controller"
    with pytest.raises(errors.ClusterError, match="Unable to contact"):
        bench.engine(run_id="run-1").cancel()
    assert len(ledger(bench).submissions()) == 1


def test_two_followers_of_a_failed_job_send_it_again_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both see it fail; whoever comes second finds what the first has sent."""
    cluster = bench.cluster
    waited = cluster.pause
    monkeypatch.setattr(cluster, "pause", lambda seconds: (time.sleep(0.002), waited(seconds))[1])
    bench.abandon("0201", run_id="owner")
    told = Recorder(running={"owner", "run-2", "run-3"})
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(list, bench.run("0201", observer=told, run_id=run)) for run in ("run-2", "run-3")]
        wait_for(lambda: len(told.attached) == 2)
        bench.fail("0201", job=0)
        wait_for(lambda: told.text().count("it is sent again") == 2 and len(told.attached) == 3)
        bench.succeed("0201")
        outcomes = [done for run in runs for done in run.result(timeout=30)]
    assert [done.report is not None for done in outcomes] == [True, True]
    assert cluster.did("submit") == 2


def wait_for(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.001)
