"""DuckDB as used here: in memory, and never reaching for the network.

DuckDB extensions are neither installed nor loaded on their own: on a closed cluster that would hang or fail.
"""

from __future__ import annotations

import duckdb


def quoted(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def connect() -> duckdb.DuckDBPyConnection:
    """An in-memory connection that never reaches for the network."""
    return duckdb.connect(
        ":memory:", config={"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
    )
