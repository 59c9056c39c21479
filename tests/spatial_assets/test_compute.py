"""The two ways of running a stage: the same reports, errors and log lines, and no work outlives its run."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from spatial_assets.compute.base import Outcome, Work
from spatial_assets.compute.local import ChildProcess, InProcess, _end_group
from spatial_assets.defs.resources import ComputeResource
from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError, InputError, Interrupted, SpatialError, StageFailed, TarError
from spatial_core.jobs.pipes import failure_from, failure_record
from spatial_core.jobs.registry import StageCall
from spatial_core.report import Report
from tests.data.make_training_lake import build_lake, train_settings

CITY = {"tars": 1, "buildings_per_tar": 3, "image_size_px": 64, "drop_images": 3, "max_views": 3}
RUNNERS: dict[str, InProcess | ChildProcess] = {"in_process": InProcess(), "subprocess": ChildProcess()}


def city_call(folder: Path, **demo: Any) -> StageCall:
    settings = Settings(demo={**CITY, **demo}, base_dir=folder)  # type: ignore[arg-type]
    return StageCall("demo-data", {"output_dir": str(folder)}, settings)


@dataclasses.dataclass
class Ran:
    """One asset run: its outcome and what the event log holds of it."""

    report: Report | None
    error: SpatialError | None
    lines: list[str]


def run_in_asset(instance: dg.DagsterInstance, work: Callable[[dg.AssetExecutionContext], Report]) -> Ran:
    found: dict[str, Any] = {}

    @dg.asset
    def anything(context) -> dg.MaterializeResult:
        try:
            found["report"] = work(context)
        except SpatialError as error:
            found["error"] = error
        return dg.MaterializeResult()

    result = dg.materialize([anything], instance=instance)
    lines = [entry.user_message for entry in instance.all_logs(result.run_id) if not entry.is_dagster_event]
    return Ran(found.get("report"), found.get("error"), lines)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_stage_runs_and_its_progress_is_in_the_event_log(runner: str, instance, tmp_path: Path) -> None:
    ran = run_in_asset(instance, lambda context: RUNNERS[runner].run(context, city_call(tmp_path)))
    assert ran.report is not None
    assert (tmp_path / "raw").is_dir()
    assert any(" of " in line for line in ran.lines), ran.lines


def test_both_ways_give_the_same_report(instance, tmp_path: Path) -> None:
    reports = {}
    for name, runner in RUNNERS.items():
        ran = run_in_asset(instance, lambda context, r=runner, n=name: r.run(context, city_call(tmp_path / n / "city")))
        assert ran.report is not None
        reports[name] = {**ran.report.to_json(), "seconds": 0}
        reports[name]["artifact"] = Path(reports[name]["artifact"]).name
    assert reports["in_process"] == reports["subprocess"]


@pytest.mark.parametrize("runner", RUNNERS)
def test_an_expected_failure_keeps_its_type_and_its_one_line(runner: str, instance, tmp_path: Path) -> None:
    tar = tmp_path / "0201.tar"
    tar.write_bytes(b"\x01" * 2048)
    call = StageCall("ingest", {"tar": str(tar), "output_dir": str(tmp_path / "out")}, Settings(base_dir=tmp_path))
    ran = run_in_asset(instance, lambda context: RUNNERS[runner].run(context, call))
    assert isinstance(ran.error, TarError)
    assert "0201.tar" in str(ran.error)
    assert "\n" not in str(ran.error)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_call_that_does_not_fit_is_refused(runner: str, instance, tmp_path: Path) -> None:
    call = StageCall("ingest", {}, Settings(base_dir=tmp_path))
    ran = run_in_asset(instance, lambda context: RUNNERS[runner].run(context, call))
    assert isinstance(ran.error, ConfigError)


def test_a_child_that_dies_silently_is_named_with_its_last_lines(instance, tmp_path: Path, monkeypatch) -> None:
    """A stage whose module cannot be imported is a bug, not an expected failure: no typed message comes back."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'spatial_core.jobs' in ' '.join(sys.orig_argv):\n"
        "    import os, signal\n    sys.stderr.write('last words\\n')\n    sys.stderr.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ran = run_in_asset(instance, lambda context: ChildProcess().run(context, city_call(tmp_path / "city")))
    assert isinstance(ran.error, StageFailed)
    assert "SIGKILL" in str(ran.error)
    assert "out of memory" in str(ran.error)
    assert "last words" in str(ran.error)


def test_settings_choose_the_way(instance, tmp_path: Path) -> None:
    """A child process is seen while the stage runs, or none is."""
    for isolation, expected in (("in_process", False), ("subprocess", True)):
        settings = Settings(demo=CITY, compute={"isolation": isolation}, base_dir=tmp_path)  # type: ignore[arg-type]
        call = StageCall("demo-data", {"output_dir": str(tmp_path / isolation)}, settings)
        before = set(psutil.Process().children())
        children: set[psutil.Process] = set()

        def work(context: dg.AssetExecutionContext, call: StageCall = call, children: set[Any] = children) -> Report:
            done = threading.Event()

            def watch() -> None:
                while not done.wait(0.02):
                    children.update(psutil.Process().children())

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                (outcome,) = ComputeResource().run_all(context, Work("city", {"": call}))
                return outcome.result()
            finally:
                done.set()
                watcher.join()

        run_in_asset(instance, work)
        started = {child.pid for child in children} - {child.pid for child in before}
        assert bool(started) == expected


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_call_has_its_outcome_and_one_that_fails_costs_no_other(runner: str, instance, tmp_path: Path) -> None:
    calls = {name: city_call(tmp_path / name) for name in ("a", "c")}
    calls = {"a": calls["a"], "b": StageCall("ingest", {}, calls["a"].settings), "c": calls["c"]}
    outcomes: list[Outcome] = []

    def work(context: dg.AssetExecutionContext) -> Report:
        outcomes.extend(RUNNERS[runner].run_all(context, Work("city", calls)))
        return outcomes[0].result()

    run_in_asset(instance, work)
    assert [outcome.key for outcome in outcomes] == ["a", "b", "c"]
    assert isinstance(outcomes[1].error, ConfigError)
    assert [outcome.report is None for outcome in outcomes] == [False, True, False]


def test_calls_side_by_side_overlap_in_time(instance, tmp_path: Path) -> None:
    calls = {name: city_call(tmp_path / name / "city", buildings_per_tar=40) for name in ("a", "b")}
    most = 0
    done = threading.Event()

    def count() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(
                most, len([child for child in psutil.Process().children() if "spatial_core.jobs" in str(cmd(child))])
            )

    def work(context: dg.AssetExecutionContext) -> Report:
        counter = threading.Thread(target=count)
        counter.start()
        try:
            outcomes = list(ComputeResource().run_all(context, Work("city", calls, side_by_side=True)))
        finally:
            done.set()
            counter.join()
        assert sorted(outcome.key for outcome in outcomes) == ["a", "b"]
        return outcomes[0].result()

    ran = run_in_asset(instance, work)
    assert ran.report is not None
    assert most == 2


def cmd(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_failures_cross_as_text() -> None:
    for error in (TarError("a\n b"), InputError("x"), StageFailed("y")):
        back = failure_from(failure_record(error))
        assert type(back) is type(error)
        assert str(back) == " ".join(str(error).split())
    unknown = failure_from({"type": "ImageError", "message": "z"})
    assert isinstance(unknown, StageFailed)
    assert "ImageError: z" in str(unknown)
    assert isinstance(failure_from({"type": "annotations", "message": "z"}), StageFailed)


SLOW_RUN = """
import sys
from pathlib import Path
import dagster as dg
from spatial_assets.compute.local import ChildProcess
from spatial_core.config.settings import Settings
from spatial_core.jobs.registry import StageCall

@dg.asset
def city(context):
    folder = Path(sys.argv[1])
    settings = Settings(demo={"tars": 98, "buildings_per_tar": 100}, base_dir=folder)
    ChildProcess().run(context, StageCall("demo-data", {"output_dir": str(folder)}, settings))

dg.materialize([city])
"""


def gone(processes: list[psutil.Process], timeout_s: float = 30.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return not alive


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["terminated", "killed"])
def test_no_work_outlives_its_run(number: signal.Signals, tmp_path: Path) -> None:
    """Dagster terminates a run by an interrupt; a run worker may also be killed outright."""
    parent = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "DAGSTER_HOME": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        family = wait_for_stage(parent, tmp_path)
        os.kill(parent.pid, number)
        assert gone(family), "the stage went on without its run"
        parent.communicate(timeout=30)
    finally:
        if parent.poll() is None:
            parent.kill()
            parent.communicate()
    if number == signal.SIGINT:
        leftovers = list(tmp_path.rglob(".*.partial"))
        assert leftovers == [], "a terminated stage removes its temporary files"


PIECES = """
import sys, time
from spatial_core.interruption import obey_termination, resumable, stop_here
obey_termination()
try:
    with resumable():
        for piece in range(2):
            stop_here("pieces")
            print("began", flush=True)
            end = time.monotonic() + float(sys.argv[1])
            while time.monotonic() < end:
                time.sleep(0.01)
finally:
    print("cleaned up", flush=True)
"""


@pytest.mark.parametrize(("piece_s", "within_s", "code"), [(1.0, (0.0, 4.0), 1), (60.0, (4.5, 9.5), 143)])
def test_a_terminated_stage_may_finish_a_short_piece_and_cleans_up_within_the_grace_period(
    piece_s: float, within_s: tuple[float, float], code: int
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PIECES, str(piece_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "began\n"
        began = time.monotonic()
        _end_group(process)
        assert within_s[0] < time.monotonic() - began < within_s[1]
        assert process.stdout.read() == "cleaned up\n"
    assert process.returncode == code


def test_a_child_that_is_told_to_stop_by_somebody_else_says_that_it_can_go_on(
    instance, tmp_path: Path, monkeypatch
) -> None:
    """As when the machine shuts down: not the run, but everything on the machine gets the signal."""
    lake = build_lake(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'spatial_core.jobs' in ' '.join(sys.orig_argv):\n"
        "    import pathlib\n"
        "    rename = pathlib.Path.replace\n"
        "    def replace(self, target):\n"
        "        result = rename(self, target)\n"
        "        if 'training_state' in str(target):\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return result\n"
        "    pathlib.Path.replace = replace\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    arguments = {"merged_dir": lake.merged, "difficulty": lake.difficulty, "output_dir": lake.output}
    call = StageCall("train", {name: str(path) for name, path in arguments.items()}, train_settings())
    ran = run_in_asset(instance, lambda context: ChildProcess().run(context, call))
    assert isinstance(ran.error, Interrupted)
    assert "1 of 3 epochs are finished; run again" in str(ran.error)


def wait_for_stage(parent: subprocess.Popen[str], folder: Path) -> list[psutil.Process]:
    """The child and what it started, once it is really at work."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if parent.poll() is not None:
            raise AssertionError(parent.communicate()[1])
        family = psutil.Process(parent.pid).children(recursive=True)
        if family and any(folder.rglob("*.partial")):
            return family
        time.sleep(0.1)
    raise AssertionError("the stage did not start")
