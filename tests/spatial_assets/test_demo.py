"""What the terminal shows while the demo runs, above all when it has to wait for somebody else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from rich.console import Console

from spatial_assets.compute.base import Outcome, Work
from spatial_assets.demo import Screen
from spatial_assets.drive import DriveEvent, _ObservedCompute
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactBusy
from spatial_core.jobs.registry import StageCall
from spatial_core.report import Report
from spatial_core.storage.atomic import exclusive
from tests.data.make_tars import street_view, tar_bytes

DONE = Report("ingest", Path("0901.parquet"), 12, 24, 24, seconds=1.5)


def show(*events: DriveEvent) -> list[str]:
    """Lines that stay on a console that is no terminal."""
    text = io.StringIO()
    with Screen(Console(file=text, width=200)) as screen:
        for event in events:
            screen.on_event(event)
    return text.getvalue().splitlines()


def test_waiting_is_said_once_and_what_was_waited_for_is_done() -> None:
    started = DriveEvent("started", "intermediates", "0901")
    busy = DriveEvent("waiting", "intermediates", "0901", "0901.parquet: another process is writing it")
    done = DriveEvent("finished", "intermediates", "0901", report=DONE)
    lines = show(started, busy, started, busy, started, done)
    assert len(lines) == 2
    assert "wait intermediates 0901" in lines[0] and "another process is writing it" in lines[0]
    assert "`make dev`" in lines[0]
    assert "done intermediates 0901" in lines[1] and "12 rows" in lines[1]


def test_texts_are_shown_as_they_are() -> None:
    lines = show(
        DriveEvent("registered", "raw_tars", message="0901[i] :smile:"),
        DriveEvent("started", "intermediates", "a[red]b"),
        DriveEvent("waiting", "intermediates", "a[red]b", "/x[/y]/z: busy"),
        DriveEvent("failed", "intermediates", "a[red]b", "expected [a-z][a-z-]"),
    )
    assert lines[0].endswith("new  raw_tars registered 0901[i] :smile:")
    assert "wait intermediates a[red]b" in lines[1] and "/x[/y]/z: busy" in lines[1]
    assert lines[2].endswith("fail intermediates a[red]b: expected [a-z][a-z-]")


@pytest.mark.parametrize(("every_s", "expected"), [(0.0, ["epoch: 1 of 40", "epoch: 2 of 40"]), (60.0, [])])
def test_where_nothing_moves_what_takes_long_says_how_far_it_is(
    every_s: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spatial_assets.demo._EVERY_S", every_s)
    lines = show(
        DriveEvent("started", "projector_checkpoint"),
        DriveEvent("progress", "projector_checkpoint", message="epoch", done=1, total=40),
        DriveEvent("progress", "projector_checkpoint", message="epoch", done=2, total=40),
    )
    assert [line.partition("projector_checkpoint")[2].strip() for line in lines] == expected


def test_an_artifact_in_other_hands_is_no_failure_of_the_demo(tmp_path: Path) -> None:
    (tmp_path / "0901.tar").write_bytes(tar_bytes(street_view(901, seed=1)))
    call = StageCall("ingest", {"tar": str(tmp_path / "0901.tar"), "output_dir": str(tmp_path)}, Settings())
    events: list[DriveEvent] = []
    compute = _ObservedCompute(events.append)
    with exclusive(tmp_path / "0901.parquet"):
        (outcome,) = run(compute, call)
    assert isinstance(outcome.error, ArtifactBusy)
    assert [event.kind for event in events if event.kind != "progress"] == ["started", "waiting"]
    assert (compute.causes, compute.outcomes) == ([], [])
    (outcome,) = run(compute, call)
    assert outcome.report is not None
    assert [made.asset for made in compute.outcomes] == ["intermediates"]


def test_a_tar_of_the_real_data_set_ends_the_demo_with_one_line_and_stays(tmp_path: Path) -> None:
    tar = tmp_path / "data" / "raw" / "0901.tar"
    tar.parent.mkdir(parents=True)
    tar.write_bytes(b"a tar of the real data set")
    done = subprocess.run(
        [sys.executable, "-m", "spatial_assets.demo"],
        cwd=tmp_path,
        env={**os.environ, "DAGSTER_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert [line for line in done.stdout.splitlines() if line.startswith("error:")] == [done.stdout.splitlines()[-1]]
    assert f"{tar}: was not drawn by `demo-data`" in done.stdout
    assert tar.read_bytes() == b"a tar of the real data set"


def run(compute: _ObservedCompute, call: StageCall) -> list[Outcome]:
    return list(compute.run_all(dg.build_asset_context(), Work("intermediates", {"0901": call})))
