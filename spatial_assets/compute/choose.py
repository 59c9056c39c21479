"""Which way of running the settings ask for."""

from __future__ import annotations

from spatial_assets.compute.base import Runner, Work
from spatial_assets.compute.local import ChildProcess, InProcess
from spatial_core.lake.catalogue import CATALOGUE


def choose_runner(work: Work) -> Runner:
    """The runner of all calls of one asset, which share their settings."""
    compute = next(iter(work.calls.values())).settings.compute
    kind = CATALOGUE.get(work.asset)
    here = work.asset in compute.local_assets or (kind is not None and kind.here)
    if compute.profile != "local" and not here:
        from spatial_assets.compute.cluster import ClusterJobs

        return ClusterJobs()
    # What runs side by side would fight over the logging and random state of one process.
    return ChildProcess() if compute.isolation == "subprocess" or work.side_by_side else InProcess()
