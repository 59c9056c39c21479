"""`spatial cluster usage`: what cluster jobs used and cost, by asset."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from rich.table import Table

from spatial_core.cli.cluster_check import cluster
from spatial_core.cli.session import ConfigOption, JsonOption, SetOption, note, print_table, read_settings
from spatial_core.cluster.usage import by_asset, read_endings
from spatial_core.cluster.usage_page import HEADER, cells
from spatial_core.lake.catalogue import CATALOGUE


@cluster.command("usage")
def usage(config: ConfigOption = None, set_: SetOption = None, json_: JsonOption = False) -> None:
    """Show what cluster jobs used and cost, by asset: everything that has ended until now."""
    settings = read_settings(config, set_)
    file = CATALOGUE["cluster_usage"].arguments(settings.locations, "")["usage_file"]
    endings, rejected = read_endings(file.read_bytes().splitlines() if file.exists() else [])
    found = by_asset(endings)
    if json_:
        sys.stdout.write(json.dumps({"assets": [asdict(one) for one in found], "rejected": rejected}, indent=2) + "\n")
        return
    for reason, count in rejected.items():
        note(f"{count} lines of {file} left out: {reason}")
    table = Table(*HEADER, title=f"{len(endings):,} jobs")
    for column in table.columns[3:]:
        column.justify = "right"
    for one in found:
        table.add_row(*cells(one))
    print_table(table)
