"""Every artifact of the lake as a DuckDB view, vectors included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa

from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError, InputError
from spatial_core.lake.catalogue import CATALOGUE, drop_keys, known_keys, raw_tar_keys
from spatial_core.lake.duck import connect, quoted
from spatial_core.lake.statistics import statistics_query, tar_files

_SPLITS = ("train", "val", "test")
# MULTI is what a pivot becomes.
_READING = frozenset({"SELECT", "EXPLAIN", "MULTI", "PRAGMA", "SET", "CALL"})
_TYPES = {
    pa.int64(): "BIGINT",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
    pa.string(): "VARCHAR",
    pa.timestamp("s"): "TIMESTAMP",
}


def _files(paths: Sequence[Path]) -> str:
    return "[" + ", ".join(quoted(str(path)) for path in paths) + "]"


def view_queries(settings: Settings) -> dict[str, str]:
    """View name -> query, for what has been made so far."""
    at = settings.locations
    views: dict[str, str] = {}
    for name in ("intermediates", "fingerprints", "backbone_embeddings", "building_embeddings"):
        kind = CATALOGUE[name]
        keys = known_keys(settings, str(kind.partition))
        made = {key: path for key in keys if (path := kind.path(at, key)).is_file()}
        if made:
            column = kind.partition
            parts = [
                f"select {quoted(key)} as {column}, * from read_parquet({quoted(str(path))})"
                for key, path in made.items()
            ]
            views[name] = " union all by name ".join(parts)
    rejects = sorted(at.intermediates_dir.glob("*_rejects.parquet"))
    if rejects:
        views["rejects"] = f"select * from read_parquet({_files(rejects)})"
    rows, listed = tar_files(settings)
    if rows or listed:
        views["tar_statistics"] = statistics_query(rows, listed)
    made_splits = [name for name in _SPLITS if (at.merged_dir / f"{name}.parquet").is_file()]
    for name in made_splits:
        views[name] = f"select * from read_parquet({quoted(str(at.merged_dir / f'{name}.parquet'))})"
    if made_splits:
        views["merged_splits"] = " union all by name ".join(
            f"select {quoted(name)} as split, * from {name}" for name in made_splits
        )
    if at.difficulty_metadata_path.is_file():
        views["difficulty_metadata"] = f"select * from read_parquet({quoted(str(at.difficulty_metadata_path))})"
    study = CATALOGUE["tuning_study"].path(at)
    if study.is_file():
        # Named, because a study without trials, or without a completed one, gives nothing to guess types from.
        columns = f"{{study: 'VARCHAR', trials: '{_sql_type(pa.struct(schemas.TRIALS))}[]'}}"
        trials = f"select study, unnest(trials) as trial from read_json({quoted(str(study))}, columns = {columns})"
        views["tuning_trials"] = f"select study, trial.* from ({trials})"
    if at.cluster_usage_path.is_file():
        views["cluster_usage"] = f"select * from read_parquet({quoted(str(at.cluster_usage_path))})"
    views |= _single_views(settings) | _raw_views(settings) | _drop_views(settings)
    manifests = sorted(
        path
        for folder in {kind.path(at, "0000").parent for kind in CATALOGUE.values() if kind.stage}
        for path in (folder / "_manifests").glob("*.json")
    )
    if manifests:
        views["artifacts"] = (
            "select artifact, provenance.stage as stage, report.rows as rows, bytes, report.seconds as seconds, "
            "sha256, provenance.config_digest as config_digest "
            f"from read_json({_files(manifests)}, union_by_name = true)"
        )
    return views


def _sql_type(kind: pa.DataType) -> str:
    """An Arrow type as DuckDB writes it."""
    if pa.types.is_struct(kind):
        fields = [kind.field(place) for place in range(kind.num_fields)]
        return f"STRUCT({', '.join(f'{field.name} {_sql_type(field.type)}' for field in fields)})"
    if pa.types.is_map(kind):
        return f"MAP({_sql_type(kind.key_type)}, {_sql_type(kind.item_type)})"
    return _TYPES[kind]


def _single_views(settings: Settings) -> dict[str, str]:
    """Training by epoch, the table of the report, the files of the model."""
    at = settings.locations
    views = {}
    for name, column, first, file in (
        ("projector_checkpoint", "history", "epoch", at.checkpoint_dir / "checkpoint_best.json"),
        ("retrieval_report", "headline", "split, method", at.report_dir / "metrics.json"),
    ):
        if file.is_file():
            rows = f"select unnest({column}) as entry from read_json({quoted(str(file))})"
            views[name] = f"select {first}, * exclude ({first}) from (select entry.* from ({rows}))"
    files = sorted(path for path in at.model_dir.rglob("*") if path.is_file()) if at.model_dir.is_dir() else []
    if files:
        listed = [(path.relative_to(at.model_dir).as_posix(), path.stat().st_size) for path in files]
        rows = ", ".join(f"({quoted(name)}, {size})" for name, size in listed)
        views["hf_model"] = f"select * from (values {rows}) as files(file, bytes)"
    return views


def _raw_views(settings: Settings) -> dict[str, str]:
    """The tars by name and size, and the rows of the drops, which lie in folders that others write to."""
    at = settings.locations
    views = {}
    tars = {key: CATALOGUE["raw_tars"].path(at, key) for key in raw_tar_keys(settings)}
    rows = [
        f"({quoted(key)}, {quoted(str(path))}, {found.st_size}, make_timestamp({found.st_mtime_ns // 1000}))"
        for key, path, found in ((key, path, path.stat()) for key, path in tars.items())
    ]
    if rows:
        views["raw_tars"] = f"select * from (values {', '.join(rows)}) as tars(tar, path, bytes, modified)"
    drops = {key: CATALOGUE["packaged_images"].path(at, key) for key in drop_keys(settings)}
    parts = [f'select {quoted(key)} as "drop", * from read_parquet({quoted(str(path))})' for key, path in drops.items()]
    if parts:
        views["packaged_images"] = " union all by name ".join(parts)
    return views


def _drop_views(settings: Settings) -> dict[str, str]:
    at = settings.locations
    vectors, rejects = [], []
    for key in known_keys(settings, "drop"):
        folder = CATALOGUE["final_embeddings"].path(at, key)
        parts = sorted((folder / "parts").glob("*.parquet"))
        if parts:
            vectors.append(f'select {quoted(key)} as "drop", * from read_parquet({_files(parts)})')
        listed = folder / "rejects.parquet"
        if listed.is_file():
            source = f"read_parquet({quoted(str(listed))})"
            rejects.append(f'select {quoted(key)} as "drop", * from {source}')
    views = {}
    if vectors:
        views["final_embeddings"] = " union all by name ".join(vectors)
    if rejects:
        views["drop_rejects"] = " union all by name ".join(rejects)
    return views


def open_lake(settings: Settings) -> tuple[duckdb.DuckDBPyConnection, dict[str, str]]:
    """A connection on which every made artifact is a view, and why there is no view of others.

    One damaged file, or two that do not fit together, must not keep the rest from being looked at.
    """
    connection = connect()
    refused = {}
    for name, query in view_queries(settings).items():
        try:
            connection.execute(f"create view {name} as {query}")
        except duckdb.Error as error:
            refused[name] = str(error).strip().splitlines()[0]
    return connection, refused


def query_lake(settings: Settings, sql: str) -> duckdb.DuckDBPyRelation:
    """Run one query over the lake.

    Raises:
        InputError: with DuckDB's cause in one line; when a table was not found, with the views there are and why others
            cannot be; if there are several statements, of which only the last would be shown.
    """
    connection, refused = open_lake(settings)
    try:
        statements = connection.extract_statements(sql)
        written = [found.type.name for found in statements if found.type.name not in _READING]
        if written:
            raise InputError(f"sql: {', '.join(written)} is no query; to write a result, use --output FILE")
        if len(statements) > 1:
            raise InputError(f"sql: {len(statements)} statements, and only one can be shown; run one after the other")
        relation = connection.sql(sql)
    except duckdb.Error as error:
        cause = str(error).strip().splitlines()[0]
        if isinstance(error, duckdb.CatalogException):
            made = [name for name in view_queries(settings) if name not in refused]
            cause += f"; views made so far: {', '.join(made) or 'none, run spatial ingest first'}"
            cause += "".join(f"; no view {name}: {why}" for name, why in refused.items())
        raise InputError(f"sql: {cause}") from error
    if relation is None:
        raise InputError("sql: the statement returns no rows; only queries are of use here")
    return relation


def write_result(relation: duckdb.DuckDBPyRelation, path: Path) -> int:
    """Write a result to .csv or .parquet, by the file's ending; returns the number of rows.

    Raises:
        ConfigError: if the ending is neither, or the file cannot be written.
    """
    writers = {".csv": relation.write_csv, ".parquet": relation.write_parquet}
    if path.suffix not in writers:
        raise ConfigError(f"{path}: results are written as .csv or .parquet")
    try:
        writers[path.suffix](str(path))
    except duckdb.IOException as error:
        raise ConfigError(f"{path}: cannot be written ({str(error).strip().splitlines()[0]})") from error
    return len(relation)
