"""The benchmark of waiting follows what it says, and counts what it costs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import waiting


def test_all_tasks_are_followed_and_looks_grow_rarer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])  # put back afterwards: the benchmark puts its own commands first
    found = waiting.measure(1200, tmp_path, wait_s=120)
    assert found.tasks == 1200
    submissions = list((tmp_path / "data" / "jobs" / "ledger").glob("*.json"))
    assert len(submissions) == 2
    assert 8 <= found.looks <= 16, "one a second would be 120"
    assert 0 < found.share < 1
    assert found.cpu_s > 0
    assert found.last_look_cpu_s <= found.cpu_s
