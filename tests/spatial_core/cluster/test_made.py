"""Requests that were answered are known without a job, as long as their artifact is."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatial_core.cluster.made import MadeBefore
from spatial_core.report import Report
from spatial_core.storage.provenance import Provenance, record_artifact


@pytest.fixture
def report(tmp_path: Path) -> Report:
    artifact = tmp_path / "0901.parquet"
    artifact.write_bytes(b"rows")
    made = Report("ingest", artifact, rows=1, rows_in=1, kept=1, seconds=3.0)
    record_artifact(artifact, "key", Provenance("ingest", "1", "digest"), made)
    return made


def test_the_same_request_is_answered(tmp_path: Path, report: Report) -> None:
    made = MadeBefore(tmp_path / "jobs", "intermediates")
    assert made.find("0901", "one") is None
    made.note("0901", "one", report)
    assert made.find("0901", "one") == report.unchanged()
    assert made.find("0901", "another request") is None
    assert made.find("0902", "one") is None
    assert MadeBefore(tmp_path / "jobs", "fingerprints").find("0901", "one") is None


@pytest.mark.parametrize("change", ["gone", "other bytes", "made anew", "damaged record"])
def test_what_has_changed_since_is_asked_for_again(tmp_path: Path, report: Report, change: str) -> None:
    made = MadeBefore(tmp_path / "jobs", "intermediates")
    made.note("", "one", report)
    if change == "gone":
        report.artifact.unlink()
    elif change == "other bytes":
        report.artifact.write_bytes(b"swor")
    elif change == "made anew":
        report.artifact.write_bytes(b"other")
        record_artifact(report.artifact, "key", Provenance("ingest", "1", "digest"), report)
    else:
        (tmp_path / "jobs" / "made" / "intermediates" / "whole.json").write_text("{")
    assert made.find("", "one") is None
