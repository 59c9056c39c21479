"""`spatial`: the stages for people without Dagster, and a look at what is in the lake."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from rich.text import Text

from spatial_core.cli.app import app
from spatial_core.cli.session import STDERR
from spatial_core.errors import ConfigError, SpatialError

# Importing a module registers its commands; `spatial --help` shows them in this order.
MODULES = tuple(
    import_module(f"spatial_core.cli.{name}")
    for name in ("stages", "tuning", "views", "stats", "report_page", "cluster", "cluster_check", "cluster_usage")
)


def main() -> None:
    """Entry point: turns expected failures into one line and an exit code."""
    try:
        app()
    except ConfigError as error:
        _fail(str(error), 2)
    except SpatialError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "), 1)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on", 1)
    except Exception as error:
        if os.environ.get("SPATIAL_DEBUG"):
            raise
        _fail(f"unexpected {type(error).__name__}: {error} (SPATIAL_DEBUG=1 shows where)", 1)


def _fail(cause: str, code: int) -> None:
    first = " ".join(cause.split())
    STDERR.print(Text.assemble(("error:", "red"), f" {first}"), soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
