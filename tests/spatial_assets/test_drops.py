"""Drops through Dagster: good ones, hopeless ones, and one written again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import dagster as dg
import pyarrow.parquet as pq
import pytest

from spatial_core.publishing.model_folder import publish_model
from tests.data.make_model import jpegs, make_backbone, make_checkpoint, model_settings, write_drop

BOTH = ["building_embeddings", "final_embeddings"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    backbone = make_backbone(root / "small-dinov2")
    checkpoint = make_checkpoint(root / "checkpoint_best.safetensors", backbone)
    publish_model(checkpoint, root / "model", model_settings(root, backbone))
    return root / "model"


@pytest.fixture
def published(daemon, lake, model_folder: Path) -> None:
    """A lake whose model is there, the daemon having looked once."""
    lake.write(compute={"isolation": "in_process"})
    shutil.copytree(model_folder, lake.settings.locations.model_dir)
    daemon.decide()
    daemon.instance.report_runless_asset_event(
        dg.AssetMaterialization("hf_model", tags={"dagster/data_version": "one"})
    )
    daemon.decide()


def arrive(daemon) -> dict[str, list[str]]:
    daemon.sense(), daemon.sense()
    return daemon.decide()


def run(daemon, key: str) -> dg.ExecuteInProcessResult:
    return daemon.definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=daemon.instance,
        asset_selection=[dg.AssetKey(name) for name in BOTH],
        partition_key=key,
        raise_on_error=False,
    )


def test_a_drop_without_a_usable_row_fails_its_own_partition_and_says_why(daemon, lake, published) -> None:
    write_drop(lake.drops / "good.parquet", jpegs(3), ["a", "a", "b"])
    write_drop(lake.drops / "hopeless.parquet", [b"x", None], ["a", "b"])
    assert arrive(daemon) == {asset: ["good", "hopeless"] for asset in BOTH}
    assert run(daemon, "good").success
    result = run(daemon, "hopeless")
    assert not result.success
    (event,) = [event for event in result.all_events if event.is_step_failure]
    cause = str(event.step_failure_data.user_failure_data.description)
    assert "none of 2 rows gives a vector (image_not_jpeg 1, image_null 1)" in cause
    listed = lake.settings.locations.final_embeddings_dir / "hopeless" / "rejects.parquet"
    assert str(listed) in cause
    assert pq.read_table(listed)["reason"].to_pylist() == ["image_not_jpeg", "image_null"]
    for asset in BOTH:
        assert daemon.instance.get_materialized_partitions(dg.AssetKey(asset)) == {"good"}
    assert [daemon.decide() for _ in range(3)] == [{}, {}, {}], "not tried again until it changes"

    write_drop(lake.drops / "hopeless.parquet", jpegs(2, seed=3), ["a", "b"])
    assert arrive(daemon) == {asset: ["hopeless"] for asset in BOTH}
    assert run(daemon, "hopeless").success


def test_a_drop_written_again_is_found_unchanged(daemon, lake, published) -> None:
    drop = write_drop(lake.drops / "june.parquet", jpegs(3), ["a", "a", "b"])
    daemon.execute(arrive(daemon))
    folder = lake.settings.locations.final_embeddings_dir / "june"
    before = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")}
    os.utime(drop, (5, 5))
    daemon.execute(arrive(daemon))
    assert {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    newest = daemon.instance.get_latest_materialization_event(dg.AssetKey("building_embeddings"))
    assert newest.asset_materialization.metadata["up_to_date"].value is True
    assert [daemon.decide() for _ in range(2)] == [{}, {}]
