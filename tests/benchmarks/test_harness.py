"""The benchmark harness measures what it says, and the ingest benchmark compares equal work."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import harness, ingest
from benchmarks.harness import Prepared, Row, compare, measure, save, table


def burn(seconds: float) -> dict[str, float]:
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
    return {"burnt": seconds}


def hold(megabytes: int) -> None:
    block = bytearray(megabytes * 1_000_000)
    block[::4096] = b"x" * len(block[::4096])
    time.sleep(0.3)


def answer(_: None) -> dict[str, int]:
    return {"answer": 42}


def fail() -> None:
    raise ValueError("on purpose")


def test_cpu_memory_and_figures_of_a_contender() -> None:
    busy = measure(partial(burn, 0.3))
    assert 0.25 < busy["cpu_s"] < 3
    assert busy["wall_s"] >= 0.25
    assert busy["figures"] == {"burnt": 0.3}
    assert 150 < measure(partial(hold, 150))["peak_mb"] < 300


def told(name: str) -> dict[str, str | None]:
    return {"value": os.environ.get(name)}


def test_variables_that_steer_a_blas_do_not_reach_contenders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OTHER", "kept")
    assert measure(partial(told, "OPENBLAS_CORETYPE"))["figures"] == {"value": None}
    assert measure(partial(told, "OTHER"))["figures"] == {"value": "kept"}
    assert os.environ["OPENBLAS_CORETYPE"] == "Haswell"
    Console(width=200).print(table([]))
    assert "run without OPENBLAS_CORETYPE" in capsys.readouterr().out
    assert json.loads(save([], "none").read_text())["machine"]["left_out_of_the_environment"] == ["OPENBLAS_CORETYPE"]


def test_preparation_is_not_timed() -> None:
    outcome = measure(Prepared(partial(time.sleep, 0.5), answer))
    assert outcome["wall_s"] < 0.5
    assert outcome["figures"] == {"answer": 42}


def test_a_failing_contender_shows_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="ValueError: on purpose"):
        measure(fail)


def test_ratio_counts_items_so_a_slow_reference_may_do_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = compare("x", "items", partial(burn, 0.1), partial(burn, 0.1), 100, 1, 2.0, reference_items=10)
    assert row.cpu_ratio == pytest.approx(10, rel=0.5)
    assert row.ratio == pytest.approx(row.ours.rate / row.reference.rate)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    record = json.loads(save([row], "x").read_text())["rows"][0]
    assert record["verdict"] == row.verdict
    assert table([row]).row_count == 1


def row(ours_s: float, target: float | None) -> Row:
    cost = harness.Cost(items=10, wall_s=2.0, cpu_s=2.0, peak_mb=1, rounds_s=(2.0,))
    ours = harness.Cost(items=10, wall_s=ours_s, cpu_s=ours_s, peak_mb=1, rounds_s=(ours_s,))
    return Row("x", "items", ours, cost, target)


def test_verdicts() -> None:
    assert row(1.0, None).verdict == ""
    assert row(1.0, 2.0).verdict == "met"
    assert row(2.0, 4.0).verdict == "missed by 75 %"


def test_the_ingest_benchmark_keeps_the_same_rows_on_both_sides(tmp_path: Path) -> None:
    tar = tmp_path / ingest.TAR_NAME
    ingest.make_tar(tar, 20)
    assert ingest.ours(tar) == {"rows": 20, "rejected": {}}
    assert ingest.reference(tar) == {"rows": 20}
