"""How many cores this process may use."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores of this process's affinity mask, which is what SLURM and containers restrict."""
    return len(os.sched_getaffinity(0))
