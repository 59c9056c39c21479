"""Manifests: when an artifact counts as finished, and when as damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatial_core.errors import AccountingError, ArtifactError, DigestMismatch, InputError
from spatial_core.report import Report
from spatial_core.storage.provenance import (
    Provenance,
    artifact_digest,
    content_digest,
    finished,
    manifest_path,
    record_artifact,
    stage_key,
    verify_artifact,
)

PROVENANCE = Provenance("ingest", "1", "c0ffee", {"data.neighbors": 3}, {"tar": "ab"})


def publish(artifact: Path, key: str = "k") -> Report:
    report = Report("ingest", artifact, rows=1, rows_in=2, kept=1, rejected={"bad": 1})
    record_artifact(artifact, key, PROVENANCE, report)
    return report


@pytest.fixture(params=["file", "folder"])
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "a"
    if request.param == "file":
        path.write_bytes(b"content")
    else:
        (path / "parts").mkdir(parents=True)
        (path / "parts" / "one").write_bytes(b"content")
    return path


def damaged(artifact: Path) -> Path:
    return artifact if artifact.is_file() else artifact / "parts" / "one"


def test_finished_means_same_key_and_same_bytes(artifact: Path) -> None:
    assert finished(artifact, "k") is None
    report = publish(artifact)
    again = finished(artifact, "k")
    assert again is not None
    assert again.up_to_date
    assert again.rejected == report.rejected
    assert finished(artifact, "other") is None
    file = damaged(artifact)
    file.write_bytes(b"content")
    assert finished(artifact, "k") is not None, "a copy with another mtime and the same bytes is the same artifact"
    file.write_bytes(b"CONTENT")
    assert finished(artifact, "k") is None


def test_changed_bytes_are_refused_as_input(artifact: Path) -> None:
    publish(artifact)
    assert artifact_digest(artifact) == content_digest(artifact)
    damaged(artifact).write_bytes(b"c0ntent")
    with pytest.raises(DigestMismatch, match="rebuild it with that stage"):
        artifact_digest(artifact)
    with pytest.raises(DigestMismatch, match="stage 'ingest'"):
        verify_artifact(artifact)


def test_a_flipped_bit_behind_an_old_mtime_is_found_by_verify(tmp_path: Path) -> None:
    import os

    path = tmp_path / "a"
    path.write_bytes(b"content")
    publish(path)
    stat = path.stat()
    path.write_bytes(b"cootent")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DigestMismatch):
        verify_artifact(path)


def test_missing_and_unreadable_records(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(InputError, match="no such file"):
        artifact_digest(path)
    path.write_bytes(b"x")
    with pytest.raises(InputError, match="no manifest"):
        verify_artifact(path)
    manifest_path(path).parent.mkdir()
    manifest_path(path).write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        finished(path, "k")


def test_the_key_depends_on_everything_that_matters() -> None:
    base = stage_key("ingest", "1", {"a": 1}, {"tar": "x"})
    assert base == stage_key("ingest", "1", {"a": 1}, {"tar": "x"})
    others = [
        stage_key("merge", "1", {"a": 1}, {"tar": "x"}),
        stage_key("ingest", "2", {"a": 1}, {"tar": "x"}),
        stage_key("ingest", "1", {"a": 2}, {"tar": "x"}),
        stage_key("ingest", "1", {"a": 1}, {"tar": "y"}),
    ]
    assert len({base, *others}) == 5


def test_a_report_that_loses_rows_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(AccountingError, match="1 unaccounted for"):
        Report("ingest", tmp_path, rows=1, rows_in=3, kept=1, rejected={"bad": 1})
