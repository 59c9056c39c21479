"""Which requests count as the same."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spatial_core.cluster.identity import identity
from spatial_core.config.settings import Settings
from spatial_core.jobs import registry
from spatial_core.jobs.registry import StageCall
from spatial_core.report import Report
from spatial_core.storage.provenance import Provenance, record_artifact


def settings(folder: Path, **sections: Any) -> Settings:
    return Settings(base_dir=folder, **sections)


def call(folder: Path, stage: str = "ingest", **sections: Any) -> StageCall:
    arguments = {"tar": str(folder / "0201.tar"), "output_dir": str(folder / "out")}
    return StageCall(stage, arguments, settings(folder, **sections))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "0201.tar").write_bytes(b"one")
    return tmp_path


def test_the_same_request_has_the_same_identity(folder: Path) -> None:
    assert identity("intermediates", "0201", call(folder)) == identity("intermediates", "0201", call(folder))


def test_how_and_where_it_runs_does_not_matter(folder: Path) -> None:
    plain = identity("intermediates", "0201", call(folder))
    compute = {"profile": "slurm_login", "retries": 2, "resources": {"intermediates": {"mem": "1G"}}}
    assert identity("intermediates", "0201", call(folder, compute=compute, infrastructure={"threads": 3})) == plain


def test_asset_key_stage_settings_and_destination_matter(folder: Path) -> None:
    plain = identity("intermediates", "0201", call(folder))
    elsewhere = StageCall("ingest", call(folder).arguments | {"output_dir": "/elsewhere"}, settings(folder))
    others = [
        identity("fingerprints", "0201", call(folder)),
        identity("intermediates", "0202", call(folder)),
        identity("intermediates", "0201", call(folder, "fingerprint")),
        identity("intermediates", "0201", call(folder, process_tar={"row_group_size": 7})),
        identity("intermediates", "0201", elsewhere),
    ]
    assert len({plain, *others}) == 6


def test_settings_that_the_stage_does_not_read_do_not_matter(folder: Path) -> None:
    """Otherwise tars would be sent to a queue again because somebody trains for longer."""
    plain = identity("intermediates", "0201", call(folder))
    other = {"training": {"num_epochs": 7}, "data": {"block_size_m": 9.0}, "tuning": {"trials": 3}}
    assert identity("intermediates", "0201", call(folder, **other)) == plain


def test_every_setting_that_the_difficulty_records_matters(folder: Path) -> None:
    (folder / "f").mkdir()
    arguments = {"fingerprints_dir": str(folder / "f"), "output_file": str(folder / "d.parquet")}
    variants = [
        {},
        {"infrastructure": {"distance_dtype": "float64"}},
        {"data": {"neighbors": 70}},
        {"global": {"seed": 7}},
    ]
    found = {
        identity("difficulty_metadata", "", StageCall("difficulty", arguments, settings(folder, **sections)))
        for sections in variants
    }
    assert len(found) == len(variants)
    threads = settings(folder, infrastructure={"threads": 3}, **{"global": {"log_dir": folder}})
    assert identity("difficulty_metadata", "", StageCall("difficulty", arguments, threads)) in found


def test_a_new_version_of_the_code_matters(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = identity("intermediates", "0201", call(folder))
    newer = replace(registry.STAGES["ingest"], code_version="next")
    monkeypatch.setitem(registry.STAGES, "ingest", newer)
    assert identity("intermediates", "0201", call(folder)) != plain


def test_a_raw_file_is_told_apart_by_size_and_time(folder: Path) -> None:
    tar = folder / "0201.tar"
    plain = identity("intermediates", "0201", call(folder))
    os.utime(tar, ns=(1, 1))
    touched = identity("intermediates", "0201", call(folder))
    tar.write_bytes(b"another")
    os.utime(tar, ns=(1, 1))
    assert len({plain, touched, identity("intermediates", "0201", call(folder))}) == 3
    tar.unlink()
    assert len({plain, touched, identity("intermediates", "0201", call(folder))}) == 3


def test_an_artifact_is_told_apart_by_its_recorded_digest(folder: Path) -> None:
    tar = folder / "0201.tar"

    def recorded(content: bytes) -> str:
        tar.write_bytes(content)
        record_artifact(tar, "key", Provenance("s", "1", "c"), Report("s", tar, 0, 0, 0))
        return identity("intermediates", "0201", call(folder))

    first = recorded(b"one")
    os.utime(tar, ns=(1, 1))
    assert identity("intermediates", "0201", call(folder)) == first
    assert recorded(b"two") != first
    assert recorded(b"one") == first


def test_a_folder_is_told_apart_by_what_lies_in_it(folder: Path) -> None:
    inputs = folder / "embeddings"
    inputs.mkdir()
    merge = StageCall("merge", {"embeddings_dir": str(inputs), "output_dir": str(folder / "merged")}, settings(folder))
    seen = {identity("merged_splits", "", merge)}
    (inputs / ".0201.parquet.lock").touch()
    (inputs / "_manifests").mkdir()
    assert identity("merged_splits", "", merge) in seen, "locks and manifests are no inputs"
    (inputs / "0201.parquet").write_bytes(b"1")
    seen.add(identity("merged_splits", "", merge))
    (inputs / "0202.parquet").write_bytes(b"1")
    seen.add(identity("merged_splits", "", merge))
    (inputs / "0202.parquet").rename(inputs / "0203.parquet")
    seen.add(identity("merged_splits", "", merge))
    assert len(seen) == 4
