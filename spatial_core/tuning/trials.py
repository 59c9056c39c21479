"""Trials of a study as records: what a worker reports of its own, and what the finished study holds of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from spatial_core.tuning.storage import ERROR, counts

WORKER = "worker"
OUTCOME = ("epochs", "best_epoch", "stopped_early", "validation_queries", "validation_images", "tracking_run", WORKER)


def attempts_before(trial: FrozenTrial) -> list[int]:
    """Numbers of the trials, oldest first, that had this one's hyper-parameters and were lost."""
    return [int(number) for number in trial.system_attrs.get("retry_history", [])]


def trial_record(trial: FrozenTrial) -> dict[str, Any]:
    """One trial as JSON."""
    before = attempts_before(trial)
    return {
        "number": trial.number,
        "state": state_of(trial),
        "value": trial.value,
        "parameters": dict(sorted(trial.params.items())),
        "intermediate_values": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
        "started": None if trial.datetime_start is None else trial.datetime_start.isoformat(timespec="seconds"),
        "seconds": None if trial.duration is None else round(trial.duration.total_seconds(), 3),
        "retry_of": before[-1] if before else None,
        "error": trial.user_attrs.get(ERROR),
        **{name: trial.user_attrs.get(name) for name in OUTCOME},
    }


def state_of(trial: FrozenTrial) -> str:
    """`complete`, `pruned`, `failed` (by its own fault), `lost`, or what it is waiting for."""
    if trial.state == TrialState.FAIL:
        return "failed" if counts(trial) else "lost"
    return trial.state.name.lower()


def tally(trials: Iterable[FrozenTrial]) -> Mapping[str, int]:
    """Trials by state."""
    found: dict[str, int] = {}
    for trial in trials:
        state = state_of(trial)
        found[state] = found.get(state, 0) + 1
    return found
