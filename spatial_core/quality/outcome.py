"""The answer of a check: what Dagster shows, `spatial check` prints and a stage may refuse on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class CheckOutcome:
    """Result of one check.

    Args:
        name: check name, stable, lower case.
        passed: whether the artifact may be used.
        severity: `error` blocks what follows, `warn` only shows.
        summary: one line a person can act on.
        figures: the numbers behind it, JSON-serialisable.
    """

    name: str
    passed: bool
    summary: str
    severity: Literal["error", "warn"] = "error"
    figures: Mapping[str, Any] = field(default_factory=dict)


def judge(name: str, faults: list[str], summary: str, **figures: Any) -> CheckOutcome:
    """Passed with `summary` when there are no faults, failed with the faults otherwise."""
    return CheckOutcome(name, not faults, "; ".join(faults) if faults else summary, "error", figures)
