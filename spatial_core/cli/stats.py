"""`spatial stats`: what each tar gave."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from spatial_core.cli.app import app
from spatial_core.cli.session import ConfigOption, JsonOption, SetOption, print_table, read_lake_settings
from spatial_core.errors import InputError
from spatial_core.lake.statistics import TarStatistics, tar_files, tar_statistics, total


@app.command()
def stats(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[TAR]...", help="Keys such as 0201; none means all.")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Count what each tar gave: images, buildings, rejected files by reason, distances, repeated images."""
    rows, rejects = tar_files(read_lake_settings(config, set_))
    if keys:
        missing = [key for key in keys if key not in {*rows, *rejects}]
        if missing:
            raise InputError(f"{', '.join(missing)}: not ingested; there are {', '.join(rows) or 'no tars yet'}")
        rows = {key: path for key, path in rows.items() if key in keys}
        rejects = {key: path for key, path in rejects.items() if key in keys}
    found = tar_statistics(rows, rejects)
    if json_:
        record = {
            "tars": [{**asdict(tar), "singleton_share": tar.singleton_share} for tar in found],
            "total": total(found),
        }
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
        return
    names = ("tar", "images", "buildings", "per building", "alone", "metres", "aligned", "repeated", "MB", "rejected")
    table = Table(*names, title="tars", caption="alone: buildings with a single image; metres: mean camera distance")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for tar in found:
        table.add_row(*_cells(tar))
    if len(found) > 1:
        table.add_section()
        table.add_row(*_totals(total(found)))
    print_table(table)


def _cells(tar: TarStatistics) -> list[str]:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in tar.reasons.items())
    return [
        tar.tar,
        f"{tar.images:,}",
        f"{tar.buildings:,}",
        _number(tar.images_per_building, ".2f"),
        f"{tar.singletons:,} ({tar.singleton_share:.0%})",
        _number(tar.distance_mean_m, ".1f"),
        f"{tar.aligned_images:,}",
        f"{tar.repeated_images:,}",
        f"{tar.image_mb:,.1f}",
        f"{tar.rejected:,} of {tar.members - tar.folders:,} files" + (f": {reasons}" if reasons else ""),
    ]


def _totals(sums: dict[str, Any]) -> list[str]:
    files = sums["members"] - sums["folders"]
    return [
        "all",
        f"{sums['images']:,}",
        f"{sums['buildings']:,}",
        _number(sums["images"] / sums["buildings"] if sums["buildings"] else None, ".2f"),
        f"{sums['singletons']:,}",
        "",
        f"{sums['aligned_images']:,}",
        f"{sums['repeated_images']:,}",
        f"{sums['image_mb']:,.1f}",
        f"{sums['rejected']:,} of {files:,} files",
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
