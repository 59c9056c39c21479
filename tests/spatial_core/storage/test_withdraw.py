"""Withdrawn artifacts: out of sight of every reader, but kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatial_core.errors import ArtifactError
from spatial_core.report import Report
from spatial_core.storage.provenance import Provenance, finished, manifest_path, record_artifact
from spatial_core.storage.withdraw import withdraw


def publish(artifact: Path, content: str) -> None:
    if artifact.suffix:
        artifact.write_text(content)
    else:
        artifact.mkdir()
        (artifact / "part").write_text(content)
    record_artifact(artifact, "key", Provenance("s", "1", "d"), Report("s", artifact, 1, 1, 1))


@pytest.mark.parametrize("name", ["a.parquet", "a_folder"])
def test_a_withdrawn_artifact_is_unfinished_and_kept(tmp_path: Path, name: str) -> None:
    artifact = tmp_path / name
    for content in ("first", "second"):
        publish(artifact, content)
        error = withdraw(artifact, "3 vectors are not finite")
        assert isinstance(error, ArtifactError)
        assert "3 vectors are not finite" in str(error)
        assert not artifact.exists()
        assert not manifest_path(artifact).exists()
        assert finished(artifact, "key") is None
        kept = tmp_path / "_withdrawn" / name
        assert str(kept) in str(error)
        assert (kept if kept.is_file() else kept / "part").read_text() == content
