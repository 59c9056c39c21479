"""A task that is being followed, the end of its call, and who is told about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from spatial_core.cluster.ending import Ending
from spatial_core.cluster.ledger import SubmissionRecord, TaskRecord
from spatial_core.cluster.resources import Resources
from spatial_core.cluster.script import log_file, message_folder
from spatial_core.errors import SpatialError
from spatial_core.jobs.messages import Said
from spatial_core.jobs.registry import StageCall
from spatial_core.report import Report


class Observer(Protocol):
    """Who follows the work: the Dagster run."""

    def log(self, level: int, text: str) -> None:
        """Show a line."""
        ...

    def submitted(self, submission: SubmissionRecord, *, attached: bool) -> None:
        """A job was submitted, or found to be on its way."""
        ...

    def in_progress(self, run_id: str) -> bool:
        """Whether another run still follows the jobs it submitted."""
        ...

    def has_ended(self, run_id: str) -> bool:
        """Whether another run is known to have ended; one of another Dagster is not known."""
        ...


@dataclass(frozen=True)
class Done:
    """How one call ended: report or error, the accounting of its last attempt, and the log of one that failed."""

    key: str
    report: Report | None = None
    error: SpatialError | None = None
    ending: Ending | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    log: str = ""


@dataclass
class Watch:
    """A task that is being followed.

    Args:
        record: its place on the cluster.
        call: what it does.
        resources: what it has asked for.
        own: whether this run is answerable for it; another run's job is only followed.
        said: what it has said.
        offset: bytes of its messages that were read.
        absent_since: when the queue knew it no longer and accounting did not know its end yet.
        ended_at: when accounting first called it finished although something of it is not there yet.
        stuck_since: when it was first seen waiting for what will not happen.
    """

    record: TaskRecord
    call: StageCall
    resources: Resources
    own: bool
    said: Said
    offset: int = 0
    absent_since: float | None = None
    ended_at: float | None = None
    stuck_since: float | None = None

    @property
    def messages(self) -> str:
        """Folder of its message file."""
        return message_folder(self.record.submission.folder)

    @property
    def log(self) -> str:
        """Its output."""
        return log_file(self.record.submission.folder, self.record.index)
