"""The sensor that looks after jobs whose run has ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from spatial_assets.defs import cluster_jobs as module
from spatial_assets.defs.cluster_jobs import FOLLOWS_TAG, cluster_jobs
from spatial_assets.defs.resources import SettingsResource
from spatial_core.cluster.ledger import Ledger, SubmissionRecord, now

FAILURE, STARTED, SUCCESS = dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.SUCCESS


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        made.add_dynamic_partitions("tar", ["0901", "0902", "0903"])
        yield made


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "config.toml"
    file.write_text('[compute]\nprofile = "slurm_login"\n')
    monkeypatch.setattr(module, "account_for_given_up", lambda *given: 0)
    return file


def run(instance: dg.DagsterInstance, status: dg.DagsterRunStatus, **tags: str) -> str:
    made: Any = instance.create_run_for_job(dg.GraphDefinition("any").to_job(), status=status, tags=tags)
    return str(made.run_id)


def sent(config: Path, run_id: str, *keys: str) -> SubmissionRecord:
    record = SubmissionRecord("spatial-x", "intermediates", "/jobs/x", run_id, keys, keys, now(), "12")
    Ledger(config.parent / "data" / "jobs").intend(record)
    return record


def tick(instance: dg.DagsterInstance, config: Path) -> list[dg.RunRequest]:
    context = dg.build_sensor_context(
        instance=instance, resources={"settings": SettingsResource(config_file=str(config))}
    )
    found: Any = cluster_jobs(context)
    return [] if isinstance(found, dg.SkipReason) else list(found.run_requests)


def test_jobs_of_a_run_in_progress_are_its_own(instance: dg.DagsterInstance, config: Path) -> None:
    sent(config, run(instance, STARTED), "0901")
    assert tick(instance, config) == []


def test_a_lost_run_is_followed_up_until_its_jobs_are_taken_note_of(instance: dg.DagsterInstance, config: Path) -> None:
    lost = run(instance, FAILURE)
    sent(config, lost, "0901", "0902")
    (first,) = tick(instance, config)
    assert (first.job_name, first.tags["dagster/asset_partition_range_end"]) == ("follow_tar", "0902")
    follows = {FOLLOWS_TAG: first.tags[FOLLOWS_TAG]}
    follower = run(instance, STARTED, **follows)
    assert tick(instance, config) == [], "one follower at a time"
    instance.report_run_failed(instance.get_run_by_id(follower))  # type: ignore[arg-type]
    (second,) = tick(instance, config)
    assert second.run_key != first.run_key, "Dagster starts a run key once"
    for _ in range(10):
        run(instance, SUCCESS, **follows)
    assert tick(instance, config) == [], "not for ever"


def test_keys_that_are_no_neighbours_are_runs_of_their_own(instance: dg.DagsterInstance, config: Path) -> None:
    sent(config, run(instance, FAILURE), "0901", "0903")
    requests = tick(instance, config)
    assert [request.partition_key for request in requests] == ["0901", "0903"]
    assert len({request.tags[FOLLOWS_TAG] for request in requests}) == 1
