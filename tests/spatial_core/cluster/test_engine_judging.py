"""What counts as success, what as failure, and what is tried again how often."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spatial_core import errors
from spatial_core.cluster.ledger import Ledger
from spatial_core.storage.provenance import manifest_path
from tests.spatial_core.cluster.simulated import Bench, Recorder


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def nothing() -> None:
    return


def without_report(bench: Bench) -> None:
    bench.make("0201")
    task = bench.cluster.task("0201")
    task.start()
    task.say("closed")
    task.end("COMPLETED")


def without_artifact(bench: Bench) -> None:
    bench.succeed("0201")
    bench.artifact("0201").unlink()


def without_manifest(bench: Bench) -> None:
    bench.succeed("0201")
    manifest_path(bench.artifact("0201")).unlink()


def with_other_bytes(bench: Bench) -> None:
    bench.succeed("0201")
    bench.artifact("0201").write_text("other rows")


LACKING = [
    (without_report, "its report did not arrive"),
    (without_artifact, "0201.parquet: no such file"),
    (without_manifest, "0201.parquet has no manifest"),
    (with_other_bytes, "its bytes changed"),
]


@pytest.mark.parametrize(("end", "cause"), LACKING)
def test_a_success_that_lacks_something_is_a_failure(end: Callable[[Bench], None], cause: str, bench: Bench) -> None:
    bench.cluster.step(lambda: end(bench))
    (done,) = bench.run("0201", poll_max_s=5)
    assert type(done.error) is errors.JobFailed
    assert "job 100 ended COMPLETED, but" in str(done.error)
    assert cause in str(done.error)
    assert done.report is None
    assert 60 <= bench.cluster.now < 75, "a slow file system was given its time"


@pytest.mark.parametrize(("end", "cause"), LACKING)
def test_what_shows_up_a_little_later_counts(end: Callable[[Bench], None], cause: str, bench: Bench) -> None:
    bench.cluster.step(lambda: end(bench), *[nothing] * 5, lambda: bench.succeed("0201"))
    (done,) = bench.run("0201", poll_max_s=5)
    assert done.report is not None


@pytest.mark.parametrize(
    "state", ["FAILED", "TIMEOUT", "OUT_OF_MEMORY", "CANCELLED by 0", "PREEMPTED", "NODE_FAIL", "DEADLINE"]
)
def test_a_report_and_an_artifact_do_not_make_a_bad_end_good(state: str, bench: Bench) -> None:
    def end() -> None:
        bench.succeed("0201")
        bench.cluster.task("0201").end(state, "0:15")

    bench.cluster.step(end)
    (done,) = bench.run("0201")
    assert done.report is None
    assert isinstance(done.error, errors.JobFailed)


def test_an_expected_failure_keeps_its_type_and_its_line(bench: Bench) -> None:
    def end() -> None:
        task = bench.cluster.task("0201")
        task.start()
        task.tell(failure={"type": "TarError", "message": "/raw/0201.tar: member at 512 is cut"})
        task.end("FAILED", "1:0")

    bench.cluster.step(end)
    (done,) = bench.run("0201", retries=3)
    assert type(done.error) is errors.TarError
    assert str(done.error) == "/raw/0201.tar: member at 512 is cut"
    assert bench.cluster.did("submit") == 1
    assert bench.cluster.did("tail") == 0


def test_an_unexpected_one_shows_error_and_last_lines(bench: Bench) -> None:
    def end() -> None:
        task = bench.cluster.task("0201")
        task.start()
        task.say("closed", exception={"name": "KeyError", "message": "KeyError: 'OSMID'\n", "stack": []})
        task.log = "Traceback (most recent call last):\n  File x\nKeyError: 'OSMID'\n"
        task.end("FAILED", "1:0")

    bench.cluster.step(end)
    (done,) = bench.run("0201")
    assert type(done.error) is errors.JobFailed
    assert "ended FAILED (exit code 1, after 9 s, on node1); KeyError: 'OSMID'; last lines: Traceback" in str(
        done.error
    )


def memory_options(bench: Bench) -> list[str]:
    return [job.option("mem") for job in bench.cluster.jobs.values()]


def time_options(bench: Bench) -> list[str]:
    return [job.option("time") for job in bench.cluster.jobs.values()]


def test_out_of_memory_is_tried_again_with_more_when_asked_for(bench: Bench) -> None:
    bench.cluster.step(lambda: bench.fail("0201", "OUT_OF_MEMORY", "0:125"), nothing, lambda: bench.succeed("0201"))
    observer = Recorder()
    resources = {"intermediates": {"mem": "3G"}}
    (done,) = bench.run("0201", observer=observer, retries=1, retry_scale=1.5, resources=resources)
    assert done.report is not None
    assert memory_options(bench) == ["3G", "4608M"]
    assert len(set(time_options(bench))) == 1
    assert "trying again with 4608M" in observer.text(30)


def test_out_of_time_is_tried_again_with_more_when_asked_for(bench: Bench) -> None:
    bench.cluster.step(lambda: bench.fail("0201", "TIMEOUT", "0:0"), nothing, lambda: bench.succeed("0201"))
    (done,) = bench.run("0201", retries=1, retry_scale=2)
    assert done.report is not None
    assert time_options(bench) == ["02:00:00", "04:00:00"]
    assert len(set(memory_options(bench))) == 1


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_tries_are_counted(retries: int, bench: Bench) -> None:
    bench.cluster.step(*[lambda: bench.fail("0201", "OUT_OF_MEMORY", "0:125")] * 20)
    (done,) = bench.run("0201", retries=retries, retry_scale=2)
    assert isinstance(done.error, errors.JobOutOfMemory)
    assert memory_options(bench) == [f"{32 * 1024 * 2**n}M" if n else "32G" for n in range(retries + 1)]


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED by 0", "PREEMPTED", "NODE_FAIL", "DEADLINE"])
def test_other_ends_are_not_tried_again(state: str, bench: Bench) -> None:
    bench.cluster.step(lambda: bench.fail("0201", state, "1:0"))
    (done,) = bench.run("0201", retries=3)
    assert isinstance(done.error, errors.JobFailed)
    assert bench.cluster.did("submit") == 1


def test_more_than_the_cluster_gives_fails_that_call_alone(bench: Bench) -> None:
    def too_much() -> None:
        bench.cluster.refusal = "Memory specification can not be satisfied"
        bench.fail("0202", "OUT_OF_MEMORY", "0:125")

    bench.cluster.step(too_much, nothing, lambda: bench.succeed("0201"))
    failed, done = bench.run("0201", "0202", retries=2)
    assert isinstance(failed.error, errors.JobOutOfMemory)
    assert str(failed.error).startswith("job 100_1 ended OUT_OF_MEMORY")
    assert "it could not be sent again: the job was refused: Memory specification can not" in str(failed.error)
    assert failed.ending is not None
    assert (done.key, done.report is not None) == ("0201", True)


def interrupt(bench: Bench, message: str, state: str = "FAILED", exit_code: str = "75:0") -> Callable[[], None]:
    def end() -> None:
        task = bench.cluster.task("0201")
        task.start()
        task.tell(interrupted={"type": "Interrupted", "message": message})
        task.end(state, exit_code)

    return end


@pytest.mark.parametrize(
    ("state", "exit_code"),
    [("FAILED", "75:0"), ("FAILED", "1:0"), ("TIMEOUT", "0:0"), ("PREEMPTED", "0:15"), ("NODE_FAIL", "0:0")],
)
def test_a_job_that_saved_its_pieces_goes_on_in_a_new_one(state: str, exit_code: str, bench: Bench) -> None:
    bench.cluster.step(interrupt(bench, "3 of 9", state, exit_code), nothing, interrupt(bench, "6 of 9"), nothing)
    bench.cluster.step(lambda: bench.succeed("0201"))
    observer = Recorder()
    (done,) = bench.run("0201", observer=observer)
    assert done.report is not None
    assert bench.cluster.did("submit") == 3
    assert observer.text().count("saved its pieces and goes on in a new job") == 2
    assert len(set(time_options(bench))) == 1


def test_one_that_gets_no_further_is_out_of_time(bench: Bench) -> None:
    bench.cluster.step(*[interrupt(bench, "3 of 9")] * 9)
    (done,) = bench.run("0201")
    assert type(done.error) is errors.JobTimedOut
    assert "got no further" in str(done.error)
    assert "3 of 9" in str(done.error)
    assert bench.cluster.did("submit") == 2


def test_one_that_gets_further_for_ever_is_ended_too(bench: Bench) -> None:
    bench.cluster.step(*[interrupt(bench, f"{count} of 900") for count in range(200)])
    (done,) = bench.run("0201")
    assert type(done.error) is errors.JobTimedOut
    assert bench.cluster.did("submit") == 51


def test_cancelled_is_cancelled_even_if_pieces_were_saved(bench: Bench) -> None:
    bench.cluster.step(interrupt(bench, "3 of 9", "CANCELLED by 0", "0:15"))
    (done,) = bench.run("0201")
    assert type(done.error) is errors.JobCancelled
    assert bench.cluster.did("submit") == 1


def test_another_runs_job_that_fails_is_sent_again_once(bench: Bench) -> None:
    bench.abandon("0201", run_id="other")
    observer = Recorder(running={"other"})
    bench.cluster.step(lambda: bench.fail("0201"), nothing, lambda: bench.fail("0201"))
    (done,) = bench.run("0201", observer=observer, run_id="run-2")
    assert type(done.error) is errors.JobFailed
    assert "job 101 ended FAILED" in str(done.error)
    assert observer.attached == ["100"]
    assert observer.submitted_jobs == ["101"]
    assert "it was another run's, so it is sent again" in observer.text(30)
    assert Ledger(bench.settings().jobs_dir).submissions() == []
