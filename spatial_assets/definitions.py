"""The code location: everything under `defs/`, one module per asset, found by Dagster itself."""

from __future__ import annotations

from pathlib import Path

import dagster as dg


@dg.definitions
def defs() -> dg.Definitions:
    """All definitions; loading them reads no settings, data or environment."""
    return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
