"""What an asset asks of the machinery that runs stages, and what it gets back. Assets know nothing else of it.

Every way of running keeps three promises: progress and log lines of the stage appear in the run's event log while it
works; an expected failure comes back as the same error type with the same one-line message; when the run is terminated,
the work ends with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import dagster as dg

from spatial_core.errors import SpatialError
from spatial_core.jobs.registry import StageCall
from spatial_core.report import Report


@dataclass(frozen=True)
class Work:
    """Stage calls of one asset.

    Args:
        asset: its name, by which resources are looked up.
        calls: partition key (empty for an asset without partitions) -> call.
        side_by_side: the calls share something and should run at the same time even on one machine, such as the
            workers of one study; otherwise one machine runs them one after another, each with all its cores.
    """

    asset: str
    calls: Mapping[str, StageCall]
    side_by_side: bool = False


@dataclass(frozen=True)
class Outcome:
    """How one call ended: with a report or with an error.

    Args:
        key: of the call.
        report: what the stage handed back.
        error: what it raised, `StageFailed` when it ended without saying why.
        metadata: where and at what cost it ran, for the asset's metadata; empty on this machine.
    """

    key: str
    report: Report | None = None
    error: SpatialError | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def result(self) -> Report:
        """The report.

        Raises:
            SpatialError: the error there is instead.
        """
        if self.report is None:
            assert self.error is not None  # noqa: S101 - one of the two is always there
            raise self.error
        return self.report


class Runner(Protocol):
    """One way of running stages."""

    def run_all(self, context: dg.AssetExecutionContext, work: Work) -> Iterator[Outcome]:
        """Run all calls to their end; outcomes come as they are known, one for each key."""
        ...


def one_line(error: SpatialError) -> str:
    """The cause as shown in the event log: type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
