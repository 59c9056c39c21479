"""Every stage beside its reference method: runs all benchmark scripts one after another and prints one table."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback

from rich.console import Console

from benchmarks.harness import Row, save, table

SCRIPTS = (
    "ingest",
    "fingerprints",
    "preprocessing",
    "backbone",
    "merge",
    "neighbours",
    "triplet_sampling",
    "training",
    "retrieval",
    "new_data",
)


def main() -> int:
    """Run the scripts named on the command line, or all; a script that fails is reported and makes the exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, metavar="SCRIPT", help=f"of {', '.join(SCRIPTS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the data relative to the usual run")
    arguments = parser.parse_args()
    console = Console(width=180)
    rows: list[Row] = []
    failed = []
    for name in arguments.scripts:
        console.print(f"[bold]{name}[/] ...")
        try:
            measured = importlib.import_module(f"benchmarks.{name}").rows(arguments.scale)
        except Exception:  # noqa: BLE001 - the other scripts still run; the failure is shown and decides the exit code
            traceback.print_exc()
            failed.append(name)
            continue
        save(measured, name)
        rows += measured
    console.print(table(rows))
    console.print(f"written to {save(rows, 'all')}")
    if failed:
        console.print(f"[red]failed: {', '.join(failed)}[/]")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
