"""Commands that look and change nothing: status, sql, verify, settings."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from spatial_core.cli.app import app
from spatial_core.cli.session import (
    STDERR,
    STDOUT,
    ConfigOption,
    JsonOption,
    SetOption,
    print_table,
    read_lake_settings,
    read_settings,
)
from spatial_core.errors import ConfigError


@app.command()
def status(config: ConfigOption = None, set_: SetOption = None, json_: JsonOption = False) -> None:
    """List what exists, what is stale (and why) and what is missing, by artifact and partition."""
    from spatial_core.lake.status import lake_status

    rows = lake_status(read_lake_settings(config, set_))
    if json_:
        sys.stdout.write(json.dumps([vars(row) for row in rows], indent=2) + "\n")
        return
    colours = {
        "made": "green", "touched": "cyan", "stale": "yellow", "missing": "red", "on demand": "dim", "gone": "magenta"
    }  # fmt: skip
    table = Table("asset", "partition", "state", "rows", "MB", "seconds", "why", title="the lake")
    for row in rows:
        table.add_row(
            row.asset,
            row.partition,
            Text(row.state, style=colours[row.state]),
            "" if row.rows is None else f"{row.rows:,}",
            "" if row.bytes is None else f"{row.bytes / 1e6:,.1f}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
            row.why,
        )
    print_table(table)
    counts = {state: sum(row.state == state for row in rows) for state in colours}
    STDOUT.print(", ".join(f"{count} {state}" for state, count in counts.items()))


class SqlFormat(StrEnum):
    """How `spatial sql` writes its result."""

    TABLE = "table"
    CSV = "csv"
    PARQUET = "parquet"


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="A query; try: select stage, count(*) from artifacts group by 1")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this .csv or .parquet file.")] = None,
    format_: Annotated[
        SqlFormat, typer.Option("--format", help="What to print when there is no --output.")
    ] = SqlFormat.TABLE,
    rows: Annotated[int, typer.Option(min=1, help="Rows shown in a table.")] = 50,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Query the lake with DuckDB: every artifact is a view, vectors included.

    Views: raw_tars, intermediates, rejects, tar_statistics, fingerprints, backbone_embeddings, train, val, test,
    merged_splits, difficulty_metadata, tuning_trials, projector_checkpoint (by epoch), retrieval_report, hf_model (its
    files), packaged_images, final_embeddings, drop_rejects, building_embeddings, cluster_usage, artifacts.
    """
    from spatial_core.lake.sql import query_lake, write_result

    settings = read_lake_settings(config, set_)
    result = query_lake(settings, query)
    if output is not None:
        STDERR.print(f"{write_result(result, output):,} rows written to {output}")
    elif format_ is SqlFormat.CSV:
        # DuckDB renders lists and decimals itself; it cannot append to a stdout that was redirected to a file.
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "result.csv"
            write_result(result, written)
            with written.open() as lines:
                shutil.copyfileobj(lines, sys.stdout)
    elif format_ is SqlFormat.PARQUET:
        raise ConfigError("--format parquet needs --output FILE.parquet")
    else:
        shown = result.limit(rows).fetchall()
        table = Table(*result.columns)
        for row in shown:
            table.add_row(*(_cell(value) for value in row))
        print_table(table)


def _cell(value: object) -> str:
    if isinstance(value, (list, tuple)) and len(value) > 6:
        first = ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value[:4])
        return f"[{first}, ... {len(value)} in all]"
    return "" if value is None else str(value)


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="An artifact's file or folder.")],
) -> None:
    """Reread every byte of an artifact and compare it with the digest recorded when it was made."""
    from spatial_core.storage.provenance import verify_artifact

    verify_artifact(artifact)
    STDOUT.print(f"{artifact}: every byte is as it was recorded")


@app.command()
def settings(config: ConfigOption = None, set_: SetOption = None, json_: JsonOption = False) -> None:
    """Show every setting with its value and meaning, and the digest recorded in artifacts."""
    from spatial_core.config.settings import section_models

    loaded = read_settings(config, set_)
    tree = loaded.model_dump(mode="json", by_alias=True)
    if json_:
        sys.stdout.write(json.dumps({"digest": loaded.digest, "settings": tree}, indent=2) + "\n")
        return
    for section, model in section_models().items():
        table = Table("key", "value", "meaning", title=f"[{section}]", title_justify="left")
        for key, field in model.model_fields.items():
            table.add_row(key, str(tree[section][key]), field.description or "")
        STDOUT.print(table)
    STDOUT.print(f"digest {loaded.digest}")
