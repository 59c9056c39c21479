"""The shared asset body, with real tars and the real ingest stage."""

from __future__ import annotations

import os
import socket
import tarfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest

from spatial_assets import patience
from spatial_assets.automation import unchanged_tag
from spatial_assets.definitions import definitions_with
from spatial_assets.defs.resources import SettingsResource
from spatial_assets.lost_runs import WORKER_TAG
from spatial_core.config.settings import Settings
from spatial_core.jobs.registry import StageCall, run_stage
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.provenance import read_manifest

CITY = {"tars": 4, "buildings_per_tar": 4, "image_size_px": 64, "drop_images": 3, "max_views": 3}
KEYS = ["0901", "0902", "0903", "0904"]


@pytest.fixture(scope="module")
def dirty_city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tars; the last has faults planted in it."""
    folder = tmp_path_factory.mktemp("city")
    settings = Settings(demo=CITY, base_dir=folder)  # type: ignore[arg-type]
    run_stage(StageCall("demo-data", {"output_dir": str(folder)}, settings))
    return folder


@pytest.fixture
def raw(lake, dirty_city: Path, instance) -> Path:
    """The city's tars in the lake, registered."""
    lake.write(compute={"isolation": "in_process"})
    lake.raw.mkdir(parents=True)
    for key in KEYS:
        (lake.raw / f"{key}.tar").write_bytes((dirty_city / "raw" / f"{key}.tar").read_bytes())
    instance.add_dynamic_partitions("tar", KEYS)
    return lake.raw


def run(lake, instance, assets: list[str], keys: list[str]) -> dg.ExecuteInProcessResult:
    definitions = definitions_with(settings=SettingsResource(config_file=str(lake.config)))
    tags = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}
    return definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance,
        asset_selection=[dg.AssetKey(asset) for asset in assets],
        tags=tags if len(keys) > 1 else None,
        partition_key=keys[0] if len(keys) == 1 else None,
        raise_on_error=False,
    )


def newest(instance, asset: str, key: str) -> dg.AssetMaterialization:
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[key]), limit=1
    ).records
    return records[0].asset_materialization


def failure_line(result: dg.ExecuteInProcessResult) -> str:
    """The message that the UI shows of the failed step."""
    (event,) = [event for event in result.all_events if event.is_step_failure]
    cause = event.step_failure_data.user_failure_data
    assert cause is not None, event.step_failure_data.error
    return str(cause.description)


def test_one_key_reports_everything_about_its_artifact(lake, raw, instance) -> None:
    assert run(lake, instance, ["intermediates"], ["0901"]).success
    metadata = newest(instance, "intermediates", "0901").metadata
    artifact = lake.settings.locations.intermediates_dir / "0901.parquet"
    manifest = read_manifest(artifact)
    assert manifest is not None
    assert metadata["dagster/partition_row_count"].value == manifest["report"]["rows"] > 0
    assert metadata["dagster/uri"].value == artifact.as_uri()
    assert metadata["sha256"].value == manifest["sha256"]
    assert metadata["config_digest"].value == lake.settings.digest
    assert metadata["elapsed_s"].value > 0
    assert metadata["up_to_date"].value is False
    columns = {column.name: column for column in metadata["dagster/column_schema"].schema.columns}
    assert columns["image_sha256"].description
    assert columns["target_lat"].type == "double"
    assert "kept" in metadata["read"].value
    assert metadata["rejected"].value
    assert metadata["images"].value == manifest["report"]["rows"]
    assert metadata["buildings"].value == manifest["report"]["details"]["buildings"]
    assert 0 < metadata["distance_mean_m"].value < 100
    assert metadata["repeated_images"].value == 0


def test_a_run_says_which_process_executes_it(lake, raw, instance) -> None:
    """By that, a run whose process is gone is told from one that takes long."""
    result = run(lake, instance, ["intermediates"], ["0901"])
    worker = instance.get_run_by_id(result.run_id).tags[WORKER_TAG]
    assert worker.split("/")[:3] == [result.run_id, socket.gethostname(), str(os.getpid())]


def test_a_range_reports_each_key_its_own_figures(lake, raw, instance) -> None:
    assert run(lake, instance, ["intermediates"], KEYS).success
    digests = {key: newest(instance, "intermediates", key).metadata["sha256"].value for key in KEYS}
    assert len(set(digests.values())) == len(KEYS)
    dirty = newest(instance, "intermediates", "0904").metadata["rejected"].value
    assert dirty.startswith("| reason |")


def test_the_second_time_nothing_is_done(lake, raw, instance) -> None:
    run(lake, instance, ["intermediates"], ["0901"])
    artifact = lake.settings.locations.intermediates_dir / "0901.parquet"
    before = artifact.stat().st_mtime_ns
    assert run(lake, instance, ["intermediates"], ["0901"]).success
    metadata = newest(instance, "intermediates", "0901").metadata
    assert (metadata["up_to_date"].value, metadata["elapsed_s"].value) == (True, 0.0)
    assert artifact.stat().st_mtime_ns == before


def test_a_run_says_whether_it_found_anything_new(lake, raw, instance) -> None:
    """The tag is what keeps a touched tar from having everything merged and trained again."""

    def tag(keys: list[str]) -> str | None:
        result = run(lake, instance, ["intermediates"], keys)
        made = instance.get_run_by_id(result.run_id)
        assert made is not None
        return made.tags.get(unchanged_tag("intermediates"))

    assert tag(KEYS[:2]) is None
    assert tag(KEYS[:2]) == "true"
    os.utime(raw / "0901.tar", (5, 5))
    assert tag(KEYS[:2]) == "true", "the bytes are the same"
    with tarfile.open(raw / "0901.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("0901/readme.txt"))
    assert tag(KEYS[:2]) is None, "0901 holds something else"
    (lake.settings.locations.intermediates_dir / "0901.parquet").unlink()
    assert tag(["0901"]) is None, "what had to be computed may be missing further down too"


def test_an_artifact_that_another_process_writes_is_waited_for(lake, raw, instance, monkeypatch) -> None:
    """As when `make demo` runs beside `make dev`."""
    artifact = lake.settings.locations.intermediates_dir / "0901.parquet"
    with ExitStack() as other:
        other.enter_context(exclusive(artifact))
        monkeypatch.setattr(patience, "time", SimpleNamespace(sleep=lambda _: other.close()))
        result = run(lake, instance, ["intermediates"], ["0901"])
    assert result.success
    assert newest(instance, "intermediates", "0901").metadata["up_to_date"].value is False
    lines = [event.message for event in instance.all_logs(result.run_id) if "waiting" in (event.user_message or "")]
    assert len(lines) == 1 and "another process is writing it" in lines[0]


def test_one_damaged_tar_fails_with_its_cause_in_one_line(lake, raw, instance) -> None:
    (raw / "0902.tar").write_bytes(b"\x01" * 4096)
    result = run(lake, instance, ["intermediates"], ["0902"])
    assert not result.success
    line = failure_line(result)
    assert line.startswith("TarError: ")
    assert "0902.tar" in line
    assert "\n" not in line
    assert instance.get_materialized_partitions(dg.AssetKey("intermediates")) == set()
    assert not (lake.settings.locations.intermediates_dir / "0902.parquet").exists()


def test_a_damaged_tar_does_not_cost_its_neighbours(lake, raw, instance) -> None:
    (raw / "0902.tar").write_bytes(b"\x01" * 4096)
    result = run(lake, instance, ["intermediates"], KEYS)
    assert not result.success
    line = failure_line(result)
    assert line.startswith("1 of 4 partitions failed (0902: TarError: ")
    assert "\n" not in line
    assert instance.get_materialized_partitions(dg.AssetKey("intermediates")) == {"0901", "0903", "0904"}
    assert newest(instance, "intermediates", "0903").metadata["dagster/partition_row_count"].value > 0
    status = instance.get_status_by_partition(
        dg.AssetKey("intermediates"), KEYS, dg.DynamicPartitionsDefinition(name="tar")
    )
    assert status is not None
    assert status["0902"].value == "FAILED"


def test_an_artifact_that_fails_its_check_is_withdrawn(lake, raw, instance) -> None:
    """The fourth tar has faults planted in it; with no tolerance for rejects it must not be built upon."""
    lake.write(compute={"isolation": "in_process"}, process_tar={"max_rejected_fraction": 0.0})
    result = run(lake, instance, ["intermediates"], ["0904"])
    assert not result.success
    assert "max_rejected_fraction" in failure_line(result)
    folder = lake.settings.locations.intermediates_dir
    assert not (folder / "0904.parquet").exists()
    assert (folder / "_withdrawn" / "0904.parquet").exists()
    assert instance.get_materialized_partitions(dg.AssetKey("intermediates")) == set()
    lake.write(compute={"isolation": "in_process"})
    assert run(lake, instance, ["intermediates"], ["0904"]).success, "with the tolerance back it is made again"


def test_a_wrong_settings_file_is_named_in_one_line(lake, raw, instance) -> None:
    lake.config.write_text("[paths]\ndata_dri = 'x'\n")
    result = run(lake, instance, ["intermediates"], ["0901"])
    line = failure_line(result)
    assert line.startswith("ConfigError: ")
    assert "did you mean paths.data_dir?" in line


def test_the_standing_check_names_missing_and_failed_keys(lake, raw, instance) -> None:
    (raw / "0902.tar").write_bytes(b"\x01" * 4096)
    run(lake, instance, ["intermediates"], KEYS[:2])
    definitions = definitions_with(settings=SettingsResource(config_file=str(lake.config)))
    result = definitions.resolve_job_def("standing_checks").execute_in_process(instance=instance)
    assert result.success, "standing checks warn, they do not fail a run"
    found = {
        (check.asset_key.to_user_string(), check.check_name): check for check in result.get_asset_check_evaluations()
    }
    intermediates = found["intermediates", "partitions_complete"]
    assert not intermediates.passed
    assert intermediates.severity == dg.AssetCheckSeverity.WARN
    assert intermediates.description == "1 failed: 0902; 2 missing: 0903, 0904"
    assert found["final_embeddings", "partitions_complete"].passed
    assert "missing" in found["raw_tars", "coverage"].description
