"""What Dagster is told of an artifact."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from spatial_assets.metadata import (
    artifact_schema,
    check_result,
    column_schema,
    markdown_table,
    materialization_metadata,
    rejected_table,
)
from spatial_assets.report_preview import inline_image
from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError
from spatial_core.quality.outcome import CheckOutcome
from spatial_core.report import Report
from spatial_core.storage.provenance import Provenance, record_artifact


def publish(artifact: Path, **figures: object) -> Report:
    report = Report("s", artifact, rows=3, rows_in=5, kept=3, rejected={"a|b": 2}, unit="members", **figures)  # type: ignore[arg-type]
    record_artifact(artifact, "key", Provenance("s", "1", "d"), report)
    return report


def test_columns_carry_meaning_and_vector_width() -> None:
    columns = {column.name: column for column in column_schema(schemas.embeddings(384, "float32")).columns}
    assert columns["embedding"].type == "float[384]"
    assert columns["embedding"].description == "pooled backbone features, not normalised"
    assert columns["embedding"].constraints.nullable is False
    assert columns["alignment_distortion"].constraints.nullable is True


def test_the_schema_reported_is_that_of_the_bytes(tmp_path: Path) -> None:
    """Not that of the definitions, which cannot know the backbone's width."""
    schema = schemas.splits(7, "float16")
    folder = tmp_path / "merged"
    folder.mkdir()
    pq.write_table(schema.empty_table(), folder / "train.parquet")
    pq.write_table(pa.schema([("leftover", pa.int8())]).empty_table(), folder / ".train.parquet.1.partial")
    found = artifact_schema(folder)
    assert found is not None
    assert [column.name for column in found.columns] == schema.names
    assert next(column.type for column in found.columns if column.name == "embedding") == "halffloat[7]"


def test_a_checkpoint_lists_its_tensors(tmp_path: Path) -> None:
    save_file({"a.weight": np.zeros((2, 3), np.float32)}, tmp_path / "c.safetensors", {"note": "x"})
    found = artifact_schema(tmp_path / "c.safetensors")
    assert found is not None
    assert [(column.name, column.type) for column in found.columns] == [("a.weight", "F32[2, 3]")]


def test_a_folder_without_tables_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("x")
    assert artifact_schema(tmp_path) is None


@pytest.mark.parametrize(("partitioned", "key"), [(True, "dagster/partition_row_count"), (False, "dagster/row_count")])
def test_a_report_becomes_metadata(tmp_path: Path, partitioned: bool, key: str) -> None:
    artifact = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1, 2, 3]}), artifact)
    report = publish(artifact, seconds=1.23456, details={"peak": 0.5, "splits": ["val"]})
    settings = Settings(base_dir=tmp_path)
    metadata = materialization_metadata(report, settings, partitioned=partitioned)
    assert metadata[key] == 3
    assert metadata["dagster/uri"] == artifact.as_uri()
    assert metadata["elapsed_s"] == 1.235
    assert metadata["config_digest"] == settings.digest
    assert len(metadata["sha256"]) == 64
    assert metadata["details"].value == {"peak": 0.5, "splits": ["val"]}
    assert metadata["rejected"].value == "| reason | members |\n| --- | --- |\n| a\\|b | 2 |"
    dg.AssetMaterialization("x", metadata=metadata)


def test_an_artifact_without_a_manifest_is_refused(tmp_path: Path) -> None:
    artifact = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1]}), artifact)
    with pytest.raises(ArtifactError, match="without a manifest"):
        materialization_metadata(Report("s", artifact, 1, 1, 1), Settings(base_dir=tmp_path), partitioned=False)


def test_nothing_rejected_is_said(tmp_path: Path) -> None:
    assert rejected_table(Report("s", tmp_path, 2, 2, 2, unit="images")) == "none of 2 images"


def test_frequent_reasons_come_first(tmp_path: Path) -> None:
    table = rejected_table(Report("s", tmp_path, 0, 6, 0, {"rare": 1, "often": 5}))
    assert table.index("often") < table.index("rare")


def test_tables_escape_what_would_end_a_cell() -> None:
    assert markdown_table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


@pytest.mark.parametrize("severity", ["error", "warn"])
def test_a_core_check_becomes_a_dagster_check(severity: str) -> None:
    outcome = CheckOutcome("coverage", False, "2 missing", severity, {"missing": ["a", "b"], "made": 3})  # type: ignore[arg-type]
    result = check_result(outcome)
    assert (result.passed, result.check_name, result.description) == (False, "coverage", "2 missing")
    assert result.severity.value == severity.upper()
    assert result.metadata["missing"].value == ["a", "b"]
    assert result.metadata["made"].value == 3


def test_a_picture_is_shown_inline(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"\x89PNG")
    assert inline_image(tmp_path / "p.png", "what it shows") == "![what it shows](data:image/png;base64,iVBORw==)"
