"""The driver behind `make demo`: everything through Dagster, nothing twice, and the daemon can go on from there."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from spatial_assets.definitions import defs
from spatial_assets.drive import DriveEvent, drive
from spatial_assets.instigators import remember_cursor, remembered_cursor
from spatial_assets.lost_runs import WORKER_TAG, mark_worker
from spatial_core.errors import InputError, StageFailed
from spatial_core.lake.catalogue import CATALOGUE
from spatial_core.lake.status import lake_status


@pytest.fixture
def disk_instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance as `make demo` uses: SQLite in a folder."""
    home = tmp_path / "dagster_home"
    home.mkdir()
    root = Path(__file__).parents[2]
    (home / "dagster.yaml").write_text((root / "dagster_home" / "dagster.yaml").read_text())
    with dg.DagsterInstance.from_config(str(home)) as made:
        yield made


def fill(lake, city: Path) -> None:
    lake.write_small()
    shutil.copytree(city / "raw", lake.raw)
    shutil.copytree(city / "drops", lake.drops)


@pytest.mark.slow
def test_everything_once_and_nothing_twice(lake, city: Path, disk_instance: dg.DagsterInstance) -> None:
    fill(lake, city)
    events: list[DriveEvent] = []
    first = drive(lake.config, disk_instance, events.append, settle_s=0.05)
    made = {(outcome.asset, outcome.partition) for outcome in first}
    tars, drops = ["0901", "0902", "0903"], ["new_images"]
    keys = {"tar": tars, "drop": drops, None: [""]}
    asked = [kind for kind in CATALOGUE.values() if kind.stage and not kind.on_demand]
    assert made == {(kind.name, key) for kind in asked for key in keys[kind.partition]}
    assert not any(outcome.up_to_date for outcome in first)
    assert {event.message for event in events if event.kind == "registered"} == {", ".join(tars), "new_images"}
    assert {(event.asset, event.partition) for event in events if event.kind == "finished"} == made
    assert not [event for event in events if event.kind == "failed"]

    second = drive(lake.config, disk_instance, settle_s=0.05)
    assert {(outcome.asset, outcome.partition) for outcome in second} == made
    assert all(outcome.up_to_date for outcome in second), [o for o in second if not o.up_to_date]

    outdated = {(status.asset, status.partition): status for status in lake_status(lake.settings)}
    wanted = {status.state for status in outdated.values() if not CATALOGUE[status.asset].on_demand}
    assert wanted == {"made"}, outdated

    # What the UI and the daemon find afterwards.
    assert disk_instance.get_dynamic_partitions("tar") == tars
    for name, kind in CATALOGUE.items():
        found = disk_instance.get_latest_materialization_event(dg.AssetKey(name))
        assert (found is None) == kind.on_demand, name
        if kind.partition:
            assert disk_instance.get_materialized_partitions(dg.AssetKey(name)) == set(keys[kind.partition])
    assert {run.status for run in disk_instance.get_runs()} == {dg.DagsterRunStatus.SUCCESS}


def test_a_folder_without_tars_says_what_to_do(lake, disk_instance: dg.DagsterInstance) -> None:
    with pytest.raises(InputError, match="spatial demo-data"):
        drive(lake.config, disk_instance, settle_s=0)


def test_the_first_cause_is_raised_in_one_line(lake, city: Path, disk_instance: dg.DagsterInstance) -> None:
    fill(lake, city)
    (lake.raw / "0902.tar").write_bytes(b"\x01" * 4096)
    events: list[DriveEvent] = []
    with pytest.raises(StageFailed, match=r"intermediates 0902: .*0902\.tar") as caught:
        drive(lake.config, disk_instance, events.append, settle_s=0.05)
    assert "\n" not in str(caught.value)
    assert [event.partition for event in events if event.kind == "failed"] == ["0902"]
    assert disk_instance.get_materialized_partitions(dg.AssetKey("intermediates")) == {"0901", "0903"}


def test_runs_of_a_killed_driver_are_closed(lake, disk_instance: dg.DagsterInstance) -> None:
    """Otherwise they would count as in progress for ever and keep their places in the pools."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    runs = {
        name: disk_instance.create_run_for_job(
            job_def=defs().resolve_implicit_global_asset_job_def(), status=dg.DagsterRunStatus.STARTED
        )
        for name in ("mine", "lost", "elsewhere", "started again", "unmarked")
    }
    place = f"{socket.gethostname()}/{process.pid}/then"
    marks = {"lost": runs["lost"].run_id, "elsewhere": f"{runs['elsewhere'].run_id}/not-", "started again": "before"}
    for name, mark in marks.items():
        worker = mark + place if mark.endswith("not-") else f"{mark}/{place}"
        disk_instance.add_run_tags(runs[name].run_id, {WORKER_TAG: worker})
    mark_worker(disk_instance, runs["mine"])
    storage = disk_instance.event_log_storage
    storage.initialize_concurrency_limit_to_default("gpu")
    assert storage.claim_concurrency_slot("gpu", runs["lost"].run_id, "step").is_claimed
    with pytest.raises(InputError):
        drive(lake.config, disk_instance, settle_s=0)
    status = {name: disk_instance.get_run_by_id(run.run_id).status.value for name, run in runs.items()}
    assert status == {name: "FAILURE" if name == "lost" else "STARTED" for name in runs}
    assert storage.claim_concurrency_slot("gpu", runs["mine"].run_id, "step").is_claimed


def test_a_cursor_is_kept_beside_what_else_is_known_of_a_sensor(disk_instance: dg.DagsterInstance) -> None:
    sensor = defs().resolve_sensor_def("raw_tars_sensor")
    assert remembered_cursor(disk_instance, sensor.name) is None
    remember_cursor(disk_instance, sensor, "one")
    assert remembered_cursor(disk_instance, sensor.name) == "one"
    (state,) = disk_instance.all_instigator_state()
    data = state.instigator_data._replace(last_tick_timestamp=7.0)
    disk_instance.update_instigator_state(state.with_data(data))
    remember_cursor(disk_instance, sensor, "two")
    (state,) = disk_instance.all_instigator_state()
    assert (state.instigator_data.cursor, state.instigator_data.last_tick_timestamp) == ("two", 7.0)
