"""`python -m spatial_core.jobs`, as a process, without Dagster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from dagster_pipes import encode_param

from spatial_core.config.settings import Settings
from spatial_core.jobs.pacing import PacedProgress
from spatial_core.jobs.registry import StageCall
from spatial_core.jobs.task import Task
from spatial_core.report import Report

CITY = {"tars": 1, "buildings_per_tar": 3, "image_size_px": 64, "drop_images": 3, "max_views": 3}


def call_file(folder: Path, stage: str = "demo-data", **arguments: str) -> Path:
    settings = Settings(demo=CITY, base_dir=folder)  # type: ignore[arg-type]
    file = folder / "call.json"
    file.write_text(StageCall(stage, arguments or {"output_dir": str(folder / "city")}, settings).to_json())
    return file


def run_jobs(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spatial_core.jobs", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_report_is_json_on_stdout_and_logs_are_on_stderr(tmp_path: Path) -> None:
    done = run_jobs("demo-data", "--call", call_file(tmp_path))
    assert done.returncode == 0, done.stderr
    report = Report.from_json(json.loads(done.stdout))
    assert report.stage == "demo-data"
    assert report.artifact.exists()
    assert " of " in done.stderr


def test_a_task_sets_its_environment_before_the_stage_runs(tmp_path: Path) -> None:
    call = StageCall.from_json(call_file(tmp_path).read_text())
    messages = tmp_path / "messages.jsonl"
    data = {"asset_keys": None, "partition_key": None, "run_id": "r", "job_name": None, "retry_number": 0, "extras": {}}
    environment = {
        "DAGSTER_PIPES_CONTEXT": encode_param({"data": data}),
        "DAGSTER_PIPES_MESSAGES": encode_param({"path": str(messages)}),
    }
    Task(call, environment).write(tmp_path / "tasks" / "0.json")
    done = run_jobs("demo-data", "--task", tmp_path / "tasks" / "0.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    sent = [json.loads(line) for line in messages.read_text().splitlines()]
    payloads = [message["params"]["payload"] for message in sent if message["method"] == "report_custom_message"]
    assert Report.from_json(payloads[-1]["report"]).artifact.exists()


def test_an_expected_failure_is_one_line_and_exit_1(tmp_path: Path) -> None:
    tar = tmp_path / "0201.tar"
    tar.write_bytes(b"\x01" * 2048)
    done = run_jobs("ingest", "--call", call_file(tmp_path, "ingest", tar=str(tar), output_dir=str(tmp_path / "out")))
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if "ERROR" in line]
    assert "TarError: " in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--call", "--task"])
@pytest.mark.parametrize("case", ["unknown stage", "no file", "not json", "another stage"])
def test_a_wrong_command_line_is_exit_2(case: str, option: str, tmp_path: Path) -> None:
    file = call_file(tmp_path)
    if option == "--task":
        Task(StageCall.from_json(file.read_text())).write(file)
    if case == "not json":
        file.write_text("{")
    stage = {"unknown stage": "paint", "another stage": "ingest"}.get(case, "demo-data")
    done = run_jobs(stage, option, tmp_path / "absent.json" if case == "no file" else file)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("usage:")


def test_termination_removes_temporary_files(tmp_path: Path) -> None:
    file = tmp_path / "call.json"
    settings = Settings(demo={"tars": 50, "buildings_per_tar": 100}, base_dir=tmp_path)  # type: ignore[arg-type]
    file.write_text(StageCall("demo-data", {"output_dir": str(tmp_path / "city")}, settings).to_json())
    command = [sys.executable, "-m", "spatial_core.jobs", "demo-data", "--call", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not any(tmp_path.rglob("*.partial")):
                assert process.poll() is None and time.monotonic() < deadline, "the stage did not start"
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGTERM
    assert not any(tmp_path.rglob("*.partial"))


def test_progress_is_paced_but_ends_are_always_told() -> None:
    now = 0.0
    lines: list[str] = []
    progress = PacedProgress(lines.append, every_s=500, clock=lambda: now)
    for done in range(1, 1001):
        now += 1
        progress(done, 1000, "images")
    assert lines == ["images: 1 of 1,000", "images: 501 of 1,000", "images: 1,000 of 1,000"]
    progress(7, None, "rows")
    assert len(lines) == 3
    now += 500
    progress(8, None, "rows")
    assert lines[-1] == "rows: 8"


def test_the_last_step_is_told_once() -> None:
    lines: list[Any] = []
    progress = PacedProgress(lines.append, every_s=5.0, clock=lambda: 0.0)
    for _ in range(3):
        progress(4, 4, "done")
    assert lines == ["done: 4 of 4"]
