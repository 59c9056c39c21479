"""What a stage hands back: the one record shown by the command line, Dagster and job logs alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from spatial_core.errors import AccountingError


@dataclass(frozen=True)
class Report:
    """Outcome of one stage on one artifact.

    Args:
        stage: name of the stage, as registered in `spatial_core.jobs.registry`.
        artifact: the file or folder that was published.
        rows: rows in the artifact.
        rows_in: things read (tar members, image rows, ...), the stage says which in `unit`.
        kept: how many of `rows_in` ended in the artifact.
        rejected: reason -> count for the rest; `rows_in == kept + sum(rejected.values())` always holds.
        seconds: wall time of the stage; 0 when nothing had to be done.
        bytes: size of the artifact on disk.
        unit: what `rows_in`, `kept` and `rejected` count.
        up_to_date: True when a finished artifact with the same inputs and settings was found and nothing was done.
        details: further figures of the stage, JSON-serialisable.

    Raises:
        AccountingError: if something that was read is neither kept nor rejected.
    """

    stage: str
    artifact: Path
    rows: int
    rows_in: int
    kept: int
    rejected: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    bytes: int = 0
    unit: str = "rows"
    up_to_date: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lost = self.rows_in - self.kept - sum(self.rejected.values())
        if lost:
            raise AccountingError(
                f"{self.stage}: {self.rows_in} {self.unit} read, {self.kept} kept, "
                f"{sum(self.rejected.values())} rejected: {lost} unaccounted for ({self.artifact})"
            )

    def to_json(self) -> dict[str, Any]:
        """A plain dict with `artifact` as a string, for `--json`, manifests and Pipes messages."""
        return {
            "stage": self.stage,
            "artifact": str(self.artifact),
            "rows": self.rows,
            "rows_in": self.rows_in,
            "kept": self.kept,
            "rejected": dict(self.rejected),
            "unit": self.unit,
            "seconds": round(self.seconds, 3),
            "bytes": self.bytes,
            "up_to_date": self.up_to_date,
            "details": dict(self.details),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Report:
        """Inverse of `to_json`."""
        return cls(**{**record, "artifact": Path(record["artifact"])})

    def unchanged(self) -> Report:
        """The same report, marked as found rather than made."""
        return replace(self, up_to_date=True, seconds=0.0)


class Progress(Protocol):
    """Called by a stage as it advances; `total` is None while unknown. Must be cheap and must not raise."""

    def __call__(self, done: int, total: int | None, message: str) -> None: ...


def silent(done: int, total: int | None, message: str) -> None:
    """A `Progress` that shows nothing."""
