"""Status: what is made, stale, missing or gone, from manifests alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spatial_core.config.settings import Settings, load_settings
from spatial_core.jobs.registry import STAGES
from spatial_core.lake.catalogue import CATALOGUE
from spatial_core.lake.status import ArtifactStatus, lake_status
from spatial_core.quality.coverage import coverage
from spatial_core.report import Report
from spatial_core.storage.provenance import Provenance, artifact_digest, record_artifact


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(overrides=[f"paths.data_dir={tmp_path}"], environ={})


def make(settings: Settings, asset: str, key: str, text: str, inputs: dict[str, str], *, code_version: str = "") -> str:
    """Publish a stand-in artifact with a true manifest; returns its digest."""
    kind = CATALOGUE[asset]
    path = kind.path(settings.locations, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    details = {}
    if asset == "intermediates":
        stat = CATALOGUE["raw_tars"].path(settings.locations, key).stat()
        details = {"tar": {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}}
    provenance = Provenance(
        kind.stage, code_version or STAGES[kind.stage].code_version, settings.digest, settings.pick("data"), inputs
    )
    record_artifact(path, "k", provenance, Report(kind.stage, path, 1, 1, 1, details=details))
    return artifact_digest(path)


def tar(settings: Settings, key: str, text: str = "tar") -> Path:
    path = CATALOGUE["raw_tars"].path(settings.locations, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def look(settings: Settings) -> dict[tuple[str, str], ArtifactStatus]:
    return {(status.asset, status.partition): status for status in lake_status(settings)}


def test_a_lake_is_followed_from_empty_to_made_to_stale(settings: Settings) -> None:
    found = {status.asset: status.state for status in lake_status(settings)}
    assert {name for name, state in found.items() if state == "on demand"} == {"tuning_study", "cluster_usage"}
    assert set(found.values()) == {"missing", "on demand"}
    raw = tar(settings, "0901")
    made = make(settings, "intermediates", "0901", "rows", {"tar": "t"})
    make(settings, "backbone_embeddings", "0901", "vectors", {"intermediates": made})
    seen = look(settings)
    assert seen["intermediates", "0901"].state == "made"
    assert seen["backbone_embeddings", "0901"].state == "made"
    assert seen["fingerprints", "0901"].state == "missing"
    assert not coverage(settings).passed

    os.utime(raw, ns=(1, 1))
    seen = look(settings)
    assert seen["intermediates", "0901"].state == "touched"
    assert "content not compared yet" in seen["intermediates", "0901"].why
    assert seen["backbone_embeddings", "0901"].state == "made"
    assert "1 touched: intermediates 0901" in coverage(settings).summary

    raw.write_text("another tar")
    seen = look(settings)
    assert seen["intermediates", "0901"].why == "0901.tar was replaced"
    assert seen["backbone_embeddings", "0901"].why == "intermediates 0901 is stale"

    make(settings, "intermediates", "0901", "other rows", {"tar": "u"})
    assert look(settings)["backbone_embeddings", "0901"].why == "intermediates 0901 changed or is new"

    raw.unlink()
    seen = look(settings)
    assert seen["raw_tars", "0901"].state == "gone"
    assert seen["intermediates", "0901"].state == "made", "what was made from a removed tar stays"


def test_settings_and_code_make_stale(settings: Settings) -> None:
    tar(settings, "0901")
    make(settings, "intermediates", "0901", "rows", {"tar": "t"})
    other = load_settings(overrides=[f"paths.data_dir={settings.locations.data_dir}", "data.neighbors=99"], environ={})
    assert look(other)["intermediates", "0901"].why == "settings changed: data"
    make(settings, "intermediates", "0901", "rows", {"tar": "t"}, code_version="0")
    assert look(settings)["intermediates", "0901"].why == "made by version 0 of the stage"


def test_a_new_tar_makes_the_merge_stale_and_other_tars_do_not_matter(settings: Settings) -> None:
    digests = {}
    for key in ("0901", "0902"):
        tar(settings, key)
        digests[key] = make(settings, "intermediates", key, f"rows {key}", {"tar": key})
    one = make(settings, "backbone_embeddings", "0901", "vectors", {"intermediates": digests["0901"]})
    make(settings, "merged_splits", "", "splits", {"0901_embeddings.parquet": one})
    assert look(settings)["merged_splits", ""].state == "made"
    make(settings, "backbone_embeddings", "0902", "more vectors", {"intermediates": digests["0902"]})
    seen = look(settings)
    assert seen["backbone_embeddings", "0901"].state == "made"
    assert seen["merged_splits", ""].why == "backbone_embeddings 0902 changed or is new"
