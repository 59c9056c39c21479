"""The Python environment that jobs run in: the same version of the project, on a file system the nodes see."""

from __future__ import annotations

import sys
from pathlib import Path

from spatial_core.config.settings import Settings


def node_python(settings: Settings) -> Path:
    """The interpreter that jobs are started with: the one named, else the one this process runs in."""
    if settings.compute.python is not None:
        return settings.absolute(settings.compute.python)
    return Path(sys.executable)
