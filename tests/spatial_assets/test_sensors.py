"""The two sensors, tick by tick, over real folders on an ephemeral instance."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import dagster as dg
import pytest

RAW = "raw_tars_sensor"
DROPS = "packaged_images_sensor"


def write(path: Path, content: bytes, mtime_s: int = 1_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (mtime_s, mtime_s))


def materializations(instance: dg.DagsterInstance, asset: str, key: str) -> list[dg.AssetMaterialization]:
    """Newest first."""
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[key]), limit=10
    ).records
    return [record.asset_materialization for record in records]


def observations(instance: dg.DagsterInstance, asset: str) -> list[dg.AssetObservation]:
    return [record.asset_observation for record in instance.fetch_observations(dg.AssetKey(asset), limit=10).records]


def test_a_fresh_lake_gets_its_folders(daemon, lake) -> None:
    assert daemon.sense() == {RAW: [], DROPS: []}
    assert lake.raw.is_dir()
    assert lake.drops.is_dir()
    assert "0 files known" in daemon.skipped[RAW]


def test_a_tar_is_registered_and_reported_once(daemon, lake, instance) -> None:
    write(lake.raw / "0201.tar", b"abc")
    assert daemon.sense(RAW) == {RAW: []}
    assert "0201.tar" in daemon.skipped[RAW]
    assert instance.get_dynamic_partitions("tar") == []
    assert daemon.sense(RAW) == {RAW: ["0201"]}
    assert daemon.sense(RAW) == {RAW: []}
    assert instance.get_dynamic_partitions("tar") == ["0201"]
    (event,) = materializations(instance, "raw_tars", "0201")
    assert event.metadata["bytes"].value == 3
    assert event.metadata["dagster/uri"].value == (lake.raw / "0201.tar").as_uri()
    assert event.tags["dagster/data_version"] == "3-1000000000000"


def test_a_drop_is_registered_under_its_name(daemon, lake, instance) -> None:
    write(lake.drops / "march_2026.parquet", b"abc")
    write(lake.drops / "no good.parquet", b"abc")
    daemon.sense(DROPS)
    assert daemon.sense(DROPS) == {DROPS: ["march_2026"]}
    assert instance.get_dynamic_partitions("drop") == ["march_2026"]
    assert len(materializations(instance, "packaged_images", "march_2026")) == 1


def test_a_copy_in_progress_is_not_registered(daemon, lake, instance) -> None:
    for size in range(1, 4):
        write(lake.raw / "0201.tar", b"x" * size)
        assert daemon.sense(RAW) == {RAW: []}
    assert instance.get_dynamic_partitions("tar") == []
    assert daemon.sense(RAW) == {RAW: ["0201"]}


def test_a_replaced_tar_is_reported_again(daemon, lake, instance) -> None:
    write(lake.raw / "0201.tar", b"abc")
    daemon.sense(RAW), daemon.sense(RAW)
    write(lake.raw / ".0201.tar.tmp", b"abcdef", mtime_s=2_000)
    (lake.raw / ".0201.tar.tmp").rename(lake.raw / "0201.tar")
    daemon.sense(RAW)
    assert len(materializations(instance, "raw_tars", "0201")) == 1
    daemon.sense(RAW)
    newest, _ = materializations(instance, "raw_tars", "0201")
    assert "replaced" in newest.description
    assert newest.tags["dagster/data_version"] == "6-2000000000000"


def test_a_tar_written_again_is_reported_as_what_a_stat_can_tell(daemon, lake, instance) -> None:
    write(lake.raw / "0201.tar", b"abc")
    daemon.sense(RAW), daemon.sense(RAW)
    os.utime(lake.raw / "0201.tar", (2_000, 2_000))
    daemon.sense(RAW), daemon.sense(RAW)
    newest, _ = materializations(instance, "raw_tars", "0201")
    assert newest.description == "0201.tar was written again in the same size"
    (lake.raw / "0201.tar").unlink()
    daemon.sense(RAW)
    write(lake.raw / "0201.tar", b"abcd", mtime_s=3_000)
    daemon.sense(RAW), daemon.sense(RAW)
    assert materializations(instance, "raw_tars", "0201")[0].description == "0201.tar was replaced"


def test_a_deleted_tar_loses_nothing_and_says_so_once(daemon, lake, instance) -> None:
    write(lake.raw / "0201.tar", b"abc")
    daemon.sense(RAW), daemon.sense(RAW)
    (lake.raw / "0201.tar").unlink()
    for _ in range(3):
        daemon.sense(RAW)
    assert instance.get_dynamic_partitions("tar") == ["0201"]
    assert len(materializations(instance, "raw_tars", "0201")) == 1
    (gone,) = observations(instance, "raw_tars")
    assert gone.partition == "0201"
    assert "everything made from it stay" in gone.description
    write(lake.raw / "0201.tar", b"abc")
    daemon.sense(RAW), daemon.sense(RAW)
    assert len(materializations(instance, "raw_tars", "0201")) == 1, "the same file again is not news"


def test_unfit_names_are_in_the_cursor_and_never_partitions(daemon, lake, instance) -> None:
    for name in ("README.md", "201.tar", "$(x).tar", "0201.tar.part"):
        write(lake.raw / name, b"abc")
    for _ in range(3):
        daemon.sense(RAW)
    assert instance.get_dynamic_partitions("tar") == []
    assert len(json.loads(daemon.cursors[RAW])["unfit"]) == 4
    assert "4 with unfit names" in daemon.skipped[RAW]


def test_a_pattern_of_the_settings_does_not_admit_unsafe_keys(daemon, lake, instance) -> None:
    lake.write(process_tar={"tar_name_pattern": ".*"})
    for name in ("0201.tar", "..tar", "x y.tar", "0202\n.tar"):
        write(lake.raw / name, b"abc")
    daemon.sense(RAW), daemon.sense(RAW)
    assert instance.get_dynamic_partitions("tar") == ["0201"]


def test_a_lost_cursor_reports_nothing_twice(daemon, lake, instance) -> None:
    write(lake.raw / "0201.tar", b"abc")
    daemon.sense(RAW), daemon.sense(RAW)
    daemon.cursors[RAW] = "{ damaged"
    assert daemon.sense(RAW) == {RAW: []}
    assert daemon.sense(RAW) == {RAW: ["0201"]}
    assert len(materializations(instance, "raw_tars", "0201")) == 1
    write(lake.raw / "0201.tar", b"other", mtime_s=3)
    daemon.cursors[RAW] = None
    daemon.sense(RAW), daemon.sense(RAW)
    assert len(materializations(instance, "raw_tars", "0201")) == 2, "a replacement is news even then"


def test_a_folder_that_vanished_is_not_taken_for_deleted_tars(daemon, lake, instance) -> None:
    write(lake.raw / "0201.tar", b"abc")
    daemon.sense(RAW), daemon.sense(RAW)
    shutil.move(lake.raw, lake.raw.with_name("unmounted"))
    daemon.sense(RAW)
    assert "is it mounted?" in daemon.skipped[RAW]
    assert not lake.raw.exists()
    assert observations(instance, "raw_tars") == []
    shutil.move(lake.raw.with_name("unmounted"), lake.raw)
    assert daemon.sense(RAW) == {RAW: []}
    assert daemon.skipped[RAW] == "1 files known"


def test_a_wrong_settings_file_fails_the_tick_with_its_cause(daemon, lake) -> None:
    lake.config.write_text("[process_tar]\ntar_name_patern = 'x'\n")
    with pytest.raises(Exception, match=r"did you mean process_tar\.tar_name_pattern"):
        daemon.sense(RAW)


def test_hundreds_of_tars_in_a_few_ticks(daemon, lake, instance) -> None:
    keys = [f"{number:04d}" for number in range(400)]
    for key in keys:
        write(lake.raw / f"{key}.tar", b"x")
    assert daemon.sense(RAW) == {RAW: []}
    assert daemon.sense(RAW) == {RAW: keys[:250]}
    assert daemon.sense(RAW) == {RAW: keys[250:]}
    assert instance.get_dynamic_partitions("tar") == keys
    assert instance.get_materialized_partitions(dg.AssetKey("raw_tars")) == set(keys)


def test_a_budget_too_small_for_one_tick_is_made_up_in_the_next(daemon, lake, instance) -> None:
    lake.write(watch={"budget_s": 1e-9})
    for number in range(4):
        write(lake.raw / f"000{number}.tar", b"x")
    for _ in range(8):
        daemon.sense(RAW)
    assert sorted(instance.get_dynamic_partitions("tar")) == ["0000", "0001", "0002", "0003"]
