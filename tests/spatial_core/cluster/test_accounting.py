"""What jobs used is written down, also of those that nobody saw end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spatial_core.cluster import accounting
from spatial_core.cluster.ledger import Ledger, SubmissionRecord, TaskRecord, now
from spatial_core.errors import ClusterUnreachable
from tests.spatial_core.cluster.simulated import Bench, Recorder


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def lines(bench: Bench) -> list[tuple[str, str]]:
    file = bench.settings().locations.usage_file
    found: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(line["partition_key"], line["state"]) for line in found]


def account(bench: Bench) -> int:
    return accounting.account_for_given_up(bench.settings(), bench.engine()._scheduler)


def cancelled(bench: Bench, *keys: str) -> None:
    """A run that is terminated at its first look, all its tasks running."""
    engine = bench.engine()
    outcomes = engine.run(bench.calls(*keys))

    def interrupt() -> None:
        for key in keys:
            bench.cluster.task(key).start()
        raise KeyboardInterrupt

    bench.cluster.step(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(outcomes)
    engine.cancel()


def test_a_cancelled_job_is_accounted_for_once_it_has_ended(bench: Bench) -> None:
    cancelled(bench, "0201", "0202")
    assert lines(bench) == []
    bench.cluster.task("0202").state = "COMPLETING"
    assert account(bench) == 1
    assert lines(bench) == [("0201", "CANCELLED")]
    bench.cluster.task("0202").state = ""
    assert (account(bench), account(bench)) == (1, 0)
    assert lines(bench) == [("0201", "CANCELLED"), ("0202", "CANCELLED")]
    assert Ledger(bench.settings().jobs_dir).unaccounted() == []


def test_one_that_failed_while_nobody_followed_is_accounted_for_by_who_asks_next(bench: Bench) -> None:
    bench.abandon("0201", "0202", run_id="dead")
    bench.fail("0201", "TIMEOUT")
    bench.cluster.step(lambda: bench.succeed("0201"), lambda: bench.succeed("0202"))
    list(bench.run("0201", "0202", run_id="run-2"))
    assert sorted(lines(bench)) == [("0201", "COMPLETED"), ("0201", "TIMEOUT"), ("0202", "COMPLETED")]


def test_one_that_can_never_start_is_accounted_for(bench: Bench) -> None:
    def refuse() -> None:
        bench.cluster.task("0201").reason = "PartitionTimeLimit"

    bench.cluster.step(refuse)
    (done,) = bench.run("0201")
    assert "could never start" in str(done.error)
    assert lines(bench) == [("0201", "CANCELLED")]


def test_what_neither_queue_nor_accounting_knows_has_vanished(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled(bench, "0201")
    bench.cluster.task("0201").account = None
    assert account(bench) == 0
    later = now() + bench.settings().compute.vanished_after_s + 1
    monkeypatch.setattr(accounting, "now", lambda: later)
    assert account(bench) == 1
    assert lines(bench) == [("0201", "VANISHED")]


def test_nothing_is_concluded_from_silence(bench: Bench) -> None:
    cancelled(bench, "0201")
    bench.cluster.accounting_error = "slurmdbd is down"
    assert account(bench) == 0
    bench.cluster.accounting_error, bench.cluster.unreachable = None, True
    with pytest.raises(ClusterUnreachable):
        account(bench)
    observer = Recorder()
    bench.cluster.unreachable = False
    bench.cluster.step(lambda: bench.succeed("0202"))
    list(bench.run("0202", observer=observer))
    assert sorted(lines(bench)) == [("0201", "CANCELLED"), ("0202", "COMPLETED")]
    assert observer.text(30) == ""


def test_a_run_ends_well_although_the_cluster_is_gone_at_its_end(bench: Bench) -> None:
    cancelled(bench, "0201")
    observer = Recorder()
    outcomes = bench.run("0202", observer=observer, run_id="run-2")
    bench.cluster.step(lambda: bench.succeed("0202"))
    assert next(outcomes).report is not None
    bench.cluster.unreachable = True
    assert list(outcomes) == []
    assert "what cancelled jobs used is not known yet: no route to host" in observer.text(30)


def test_every_attempt_of_a_job_that_was_queued_again_counts(bench: Bench) -> None:
    bench.cluster.step(lambda: bench.succeed("0201"))
    (done,) = bench.run("0201")
    assert done.ending is not None
    first = replace(done.ending, state="REQUEUED", start="a", elapsed_s=3600, gpus=1)
    ending = replace(done.ending, earlier=(first,))
    settings = bench.settings(cost_per_gpu_hour=2.0)
    task = TaskRecord(SubmissionRecord("n", "intermediates", "/f", "run", ("0202",), ("i",), 0.0, "7"), 0)
    accounting.keep_usage(settings, task, ending, {"gpu_utilisation": 0.5})
    kept = [json.loads(line) for line in settings.locations.usage_file.read_text().splitlines()][-2:]
    assert [(one["state"], one["cost"], one["gpu_utilisation"]) for one in kept] == [
        ("REQUEUED", 2.0, None),
        ("COMPLETED", 0.0, 0.5),
    ]
