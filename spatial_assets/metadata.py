"""What Dagster shows of an artifact, made from its report, schema and manifest. No stage is known here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq

from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError
from spatial_core.quality.outcome import CheckOutcome
from spatial_core.report import Report
from spatial_core.storage.provenance import read_manifest

DATA_VERSION_TAG = "dagster/data_version"
_DESCRIPTION = b"description"


def column_schema(schema: pa.Schema) -> dg.TableSchema:
    """Columns with type, nullability and the meaning that the artifact's schema carries."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                name=field.name,
                type=_type_name(field.type),
                description=(field.metadata or {}).get(_DESCRIPTION, b"").decode() or None,
                constraints=dg.TableColumnConstraints(nullable=field.nullable),
            )
            for field in schema
        ]
    )


def tensor_schema(path: Path) -> dg.TableSchema:
    """Tensors of a safetensors file as columns: name, element type and shape. Reads the header only."""
    with path.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return dg.TableSchema(
        columns=[
            dg.TableColumn(name=name, type=f"{entry['dtype']}{entry['shape']}")
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    )


def artifact_schema(artifact: Path) -> dg.TableSchema | None:
    """Schema of what was published: the parquet, the first parquet of a folder, or the tensors; None for other files.

    The parquet files of one artifact have one schema.
    """
    if artifact.suffix == ".safetensors":
        return tensor_schema(artifact)
    if artifact.is_file():
        return column_schema(pq.read_schema(artifact)) if artifact.suffix == ".parquet" else None
    first = next(iter(sorted(artifact.rglob("[!.]*.parquet"))), None)
    if first is not None:
        return column_schema(pq.read_schema(first))
    weights = artifact / "model.safetensors"
    return tensor_schema(weights) if weights.is_file() else None


def materialization_metadata(report: Report, settings: Settings, *, partitioned: bool) -> dict[str, Any]:
    """Rows, columns, place, identity, time and accounting of a finished artifact."""
    metadata: dict[str, Any] = {
        "dagster/partition_row_count" if partitioned else "dagster/row_count": report.rows,
        "dagster/uri": report.artifact.as_uri(),
        "path": dg.MetadataValue.path(report.artifact),
        "sha256": artifact_sha256(report.artifact),
        "config_digest": settings.digest,
        "elapsed_s": round(report.seconds, 3),
        "bytes": report.bytes,
        "read": dg.MetadataValue.text(f"{report.rows_in:,} {report.unit}, {report.kept:,} kept"),
        "rejected": dg.MetadataValue.md(rejected_table(report)),
        "up_to_date": report.up_to_date,
    }
    if (schema := artifact_schema(report.artifact)) is not None:
        metadata["dagster/column_schema"] = schema
    if report.details:
        metadata["details"] = dg.MetadataValue.json(dict(report.details))
    return metadata


def rejected_table(report: Report) -> str:
    """Rejections by reason as a markdown table, most frequent first."""
    if not report.rejected:
        return f"none of {report.rows_in:,} {report.unit}"
    rows = sorted(report.rejected.items(), key=lambda item: (-item[1], item[0]))
    return markdown_table(("reason", report.unit), [(reason, f"{count:,}") for reason, count in rows])


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A markdown table; `|` inside cells is escaped."""
    names = list(header)
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def check_metadata(outcome: CheckOutcome) -> dict[str, Any]:
    """The figures behind a check."""
    return {"summary": outcome.summary, **{name: _value(value) for name, value in outcome.figures.items()}}


def check_result(outcome: CheckOutcome, asset: str | None = None) -> dg.AssetCheckResult:
    """A core check's outcome as Dagster's."""
    severity = dg.AssetCheckSeverity.ERROR if outcome.severity == "error" else dg.AssetCheckSeverity.WARN
    return dg.AssetCheckResult(
        passed=outcome.passed,
        asset_key=asset,
        check_name=outcome.name,
        severity=severity,
        description=outcome.summary,
        metadata=check_metadata(outcome),
    )


def artifact_sha256(artifact: Path) -> str:
    """The digest recorded when the artifact was published.

    Raises:
        ArtifactError: if the stage left no manifest.
    """
    record = read_manifest(artifact)
    if record is None:
        raise ArtifactError(f"{artifact}: published without a manifest; rebuild it")
    return str(record["sha256"])


def _type_name(kind: pa.DataType) -> str:
    if pa.types.is_fixed_size_list(kind):
        return f"{kind.value_type}[{kind.list_size}]"
    return str(kind)


def _value(value: Any) -> Any:
    return dg.MetadataValue.json(value) if isinstance(value, (dict, list)) else value
