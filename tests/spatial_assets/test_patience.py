"""Two processes reach for one artifact: the second waits, says so once, and finds it made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spatial_assets import patience
from spatial_assets.compute.base import Outcome, Work
from spatial_assets.patience import outlasting_others
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactBusy, SpatialError, TarError
from spatial_core.jobs.registry import StageCall
from spatial_core.report import Report

KEYS = ("0901", "0902", "0903")
DONE = Report("ingest", Path("made.parquet"), 1, 1, 1)
WORK = Work("intermediates", dict.fromkeys(KEYS, StageCall("ingest", {}, Settings())))


class Machine:
    """Some keys are busy a few times, then done, or failed."""

    def __init__(self, busy: dict[str, int], failure: dict[str, SpatialError] | None = None) -> None:
        self.left = dict(busy)
        self.failure = failure or {}
        self.asked: list[tuple[str, ...]] = []

    def run_all(self, work: Work) -> Iterator[Outcome]:
        self.asked.append(tuple(work.calls))
        for key in work.calls:
            if self.left.get(key, 0):
                self.left[key] -= 1
                yield Outcome(key, error=ArtifactBusy(f"{key}.parquet: another process is writing it"))
            elif key in self.failure:
                yield Outcome(key, error=self.failure[key])
            else:
                yield Outcome(key, report=DONE)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_PAUSE_S", 0)


def test_what_nobody_else_makes_is_made_at_once() -> None:
    told: list[str] = []
    machine = Machine({})
    assert [outcome.key for outcome in outlasting_others(machine.run_all, WORK, told.append)] == list(KEYS)
    assert (told, machine.asked) == ([], [KEYS])
    assert list(outlasting_others(machine.run_all, Work("intermediates", {}), told.append)) == []


def test_only_busy_keys_are_asked_for_again_and_waiting_is_said_once() -> None:
    told: list[str] = []
    machine = Machine({"0901": 3, "0902": 1})
    outcomes = list(outlasting_others(machine.run_all, WORK, told.append))
    assert [outcome.key for outcome in outcomes] == ["0903", "0902", "0901"]
    assert all(outcome.report is DONE for outcome in outcomes)
    assert machine.asked == [KEYS, ("0901", "0902"), ("0901",), ("0901",)]
    assert told == [f"waiting: {key}.parquet: another process is writing it" for key in ("0901", "0902")]


def test_patience_ends() -> None:
    seconds = iter(range(100))
    machine = Machine({"0901": 99})
    outcomes = list(outlasting_others(machine.run_all, WORK, lambda _: None, patience_s=5, clock=lambda: next(seconds)))
    assert [outcome.key for outcome in outcomes] == ["0902", "0903", "0901"]
    assert isinstance(outcomes[-1].error, ArtifactBusy)
    assert len(machine.asked) == 5


def test_other_failures_are_not_waited_out() -> None:
    machine = Machine({"0901": 1}, {"0901": TarError("0901.tar: byte 0: cut")})
    *_, last = outlasting_others(machine.run_all, WORK, lambda _: None)
    assert isinstance(last.error, TarError)
    assert len(machine.asked) == 2
