"""The code location: everything under `defs/`, one module per asset, found by Dagster itself.

Modules with decorated definitions have no `from __future__ import annotations`: Dagster reads the type of a `context`
parameter when the module is imported, and refuses one that is still a string.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg


@dg.definitions
def defs() -> dg.Definitions:
    """All definitions; loading them reads no settings, data or environment."""
    return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)


def definitions_with(**resources: Any) -> dg.Definitions:
    """The same definitions with some resources in the place of their own, for a driver or a test."""
    own = defs()
    return dg.Definitions(
        assets=own.assets,
        asset_checks=own.asset_checks,
        schedules=own.schedules,
        sensors=own.sensors,
        jobs=own.jobs,
        resources={**(own.resources or {}), **resources},
        executor=own.executor,
    )
