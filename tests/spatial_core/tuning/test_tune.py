"""A whole study on this machine: workers side by side on the embedded PostgreSQL, and what it comes to."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactBusy, ConfigError, StageFailed
from spatial_core.jobs.registry import StageCall, run_stage
from spatial_core.report import Report
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.provenance import verify_artifact
from spatial_core.tuning.orchestrate import tune
from spatial_core.tuning.secrets import read_secret
from spatial_core.tuning.worker import trial_folder
from tests.data.make_training_lake import Lake
from tests.spatial_core.tuning.conftest import MakeSettings, keeper_of, study_by_one


def search(lake: Lake, output: Path, settings: Settings, **named: Any) -> Report:
    return tune(lake.merged, lake.difficulty, output, settings, **named)


def trials_of(report: Report) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(report.artifact.read_text())["trials"]
    return found


def workers() -> dict[str, psutil.Process]:
    """Running workers that this process started, by name."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        try:
            line = child.cmdline()
        except psutil.NoSuchProcess:
            continue
        if "tune-worker" in line:
            found[Path(line[line.index("--call") + 1]).stem] = child
    return found


class Watch:
    """Calls something again and again while the block runs."""

    def __init__(self, look: Callable[[], bool]) -> None:
        self._look = look
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set() and self._look():
            time.sleep(0.02)


def test_two_workers_share_a_study_and_keep_its_password_to_themselves(
    lake: Lake, tuned: MakeSettings, tmp_path: Path
) -> None:
    settings = tuned("tuning.workers=2", "tuning.trials=5")
    output = settings.locations.tuning_dir
    lines: set[bytes] = set()
    password: list[bytes] = []

    def look() -> bool:
        file = output / "storage.url"
        if file.is_file() and not password:
            password.append(str(urlsplit(read_secret(file)).password).encode())
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                lines.add((folder / "cmdline").read_bytes())
            except OSError:
                continue
        return True

    with Watch(look):
        report = search(lake, output, settings)
    assert not workers()
    assert (report.rows, report.kept, dict(report.rejected), report.unit) == (5, 5, {}, "trials")
    verify_artifact(report.artifact)
    trials = trials_of(report)
    assert {trial["worker"] for trial in trials} == {"00", "01"}
    assert [trial["number"] for trial in trials] == list(range(5))
    for trial in trials:
        assert (trial_folder(output, trial["number"]) / "checkpoint_best.safetensors").is_file()
    for name in ("00", "01"):
        verify_artifact(output / "workers" / f"worker_{name}.json")
    assert any(b"tune-worker" in line for line in lines)
    assert password
    assert not [line for line in lines if password[0] in line], "the password was in a command line"
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and password[0] in path.read_bytes()]
    assert holders == [output / "storage.url"]
    assert holders[0].stat().st_mode & 0o777 == 0o600
    again = search(lake, output, settings)
    assert (again.up_to_date, again.rows) == (True, 5)


def test_the_study_file_says_what_was_found(lake: Lake, database: Path, tuned: MakeSettings, tmp_path: Path) -> None:
    settings = tuned("tuning.trials=11", "tuning.max_epochs=1", "logging.wandb_enabled=false")
    report = study_by_one(lake, tmp_path, settings, database)
    record = json.loads(report.artifact.read_text())
    complete = {trial["number"]: trial["value"] for trial in record["trials"]}
    best = record["best"]
    assert best["value"] == max(complete.values()) == complete[best["number"]]
    assert best["parameters"] == record["trials"][best["number"]]["parameters"]
    assert sum(record["importances"].values()) == pytest.approx(1, abs=1e-3)
    assert set(record["importances"]) <= set(best["parameters"])
    assert record["evaluation"] == {"retrieval_metric_max_queries": 4096, "queries": 31, "images": 33}
    assert (record["direction"], record["metric"]) == ("maximize", "recall@1")
    assert re.fullmatch(r"test-the-study-file-says-what-was-found-[0-9a-f]{8}", record["study"])
    assert set(record["provenance"]["inputs"]) == {"train", "val", "difficulty_metadata"}
    assert record["space"]["hidden_dim"] == {"values": [16, 24]}
    for trial in record["trials"]:
        assert trial["state"] == "complete"
        assert trial["seconds"] > 0
        assert len(trial["intermediate_values"]) == 1
    assert "//" not in report.artifact.read_text(), "no place of the database is in the artifact"
    page = (tmp_path / "study.html").read_text()
    assert "<script src" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert f"The best of 11 trials reaches {100 * best['value']:.1f}" in page
    assert page.count('class="dot"') >= 22


def test_a_study_is_continued_and_another_question_is_another_study(
    lake: Lake, database: Path, tuned: MakeSettings, tmp_path: Path
) -> None:
    short = ("tuning.max_epochs=1", "tuning.startup_trials=9")
    first = study_by_one(lake, tmp_path, tuned("tuning.trials=2", *short), database)
    before = trials_of(first)
    more = search(lake, tmp_path, tuned("tuning.trials=4", *short, "tuning.workers=2"), storage_file=database)
    after = trials_of(more)
    assert [trial["number"] for trial in after] == [0, 1, 2, 3]
    assert after[:2] == before
    other = study_by_one(lake, tmp_path, tuned("tuning.trials=1", *short, "training.margin=0.4"), database)
    assert other.details["study"] == more.details["study"], "what is searched is not part of the question"
    assert len(trials_of(other)) == 4
    asked = tuned("tuning.trials=1", *short, "training.ucb_reward=negative_loss")
    changed = study_by_one(lake, tmp_path, asked, database)
    assert changed.details["study"] != more.details["study"]
    assert len(trials_of(changed)) == 1
    assert [folder.name for folder in (tmp_path / "trials").iterdir()] == ["trial_00000"]


def test_a_killed_worker_is_recovered(lake: Lake, tuned: MakeSettings) -> None:
    settings = tuned("tuning.workers=2", "tuning.trials=4", "tuning.max_epochs=25")
    output = settings.locations.tuning_dir
    killed: list[int] = []

    def look() -> bool:
        trial = next((output / "trials").glob("trial_*/training_state.safetensors"), None)
        if trial is None:
            return True
        number = int(trial.parent.name.removeprefix("trial_"))
        found = workers()
        if found:
            name = min(found)
            os.kill(found[name].pid, signal.SIGKILL)
            killed.append(number)
        return False

    with Watch(look):
        report = search(lake, output, settings)
    assert killed
    trials = trials_of(report)
    states = [trial["state"] for trial in trials]
    assert states.count("lost") == 1
    assert states.count("complete") == 4
    lost = next(trial for trial in trials if trial["state"] == "lost")
    retried = next(trial for trial in trials if trial["retry_of"] == lost["number"])
    assert retried["parameters"] == lost["parameters"]
    assert retried["state"] == "complete"
    assert (report.kept, dict(report.rejected)) == (4, {"lost": 1})


def test_a_database_that_dies_costs_no_trial(lake: Lake, tuned: MakeSettings) -> None:
    """Its keeper starts it again, and workers wait for it."""
    settings = tuned("tuning.workers=2", "tuning.trials=4", "tuning.max_epochs=25", "tuning.grace_s=60")
    output = settings.locations.tuning_dir
    died: list[int] = []

    def look() -> bool:
        if not list((output / "trials").glob("trial_*/training_state.safetensors")):
            return True
        (server,) = keeper_of(output).children()
        died.append(server.pid)
        server.send_signal(signal.SIGQUIT)
        return False

    with Watch(look):
        report = search(lake, output, settings)
    assert died
    assert (report.rows, report.kept) == (4, 4)
    assert "terminating any other active server processes" in (output / "postgres.log").read_text() or (
        "immediate shutdown" in (output / "postgres.log").read_text()
    )


def test_a_study_whose_workers_all_fail_says_so(
    lake: Lake, database: Path, tuned: MakeSettings, tmp_path: Path
) -> None:
    settings = tuned('tuning.space={activation=["tanh"]}', "tuning.workers=2")
    with pytest.raises(
        StageFailed, match=r"no worker finished a trial, 3 of 3 are wanting.*worker 00: ConfigError.*tanh"
    ):
        search(lake, tmp_path, settings, storage_file=database)


def test_a_share_that_is_too_small_leaves_a_study_to_be_continued(
    lake: Lake, database: Path, tuned: MakeSettings, tmp_path: Path
) -> None:
    settings = tuned("tuning.trials_per_worker=1", "tuning.trials=2", "tuning.max_epochs=1")
    first = search(lake, tmp_path, settings, storage_file=database)
    assert (first.rows, first.details["wanted"]) == (1, 2)
    assert study_by_one(lake, tmp_path, settings, database).rows == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tuning.metric=loss", "recall@k"),
        ("tuning.metric=recall@0", "recall@k"),
        ("tuning.space={depth=[1, 2]}", "no such hyper-parameter"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_starts(
    lake: Lake, tuned: MakeSettings, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        search(lake, tmp_path / "out", tuned(override))
    assert not list(tmp_path.iterdir())


def test_sqlite_with_several_workers_is_refused(lake: Lake, tuned: MakeSettings, tmp_path: Path) -> None:
    settings = tuned("tuning.storage_url=sqlite:///studies.db", "tuning.workers=2")
    with pytest.raises(ConfigError, match="several workers would corrupt"):
        search(lake, tmp_path / "out", settings)


def test_two_do_not_tune_in_one_place(lake: Lake, database: Path, tuned: MakeSettings, tmp_path: Path) -> None:
    with exclusive(tmp_path / "workers"), pytest.raises(ArtifactBusy):
        search(lake, tmp_path, tuned(), storage_file=database)


def test_workers_end_with_the_process_that_started_them(lake: Lake, tuned: MakeSettings, tmp_path: Path) -> None:
    settings = tuned("tuning.workers=2", "tuning.trials=50", "tuning.max_epochs=200")
    arguments = {
        "merged_dir": str(lake.merged),
        "difficulty": str(lake.difficulty),
        "output_dir": str(tmp_path / "out"),
    }
    call = tmp_path / "call.json"
    call.write_text(StageCall("tune", arguments, settings).to_json())
    command = [sys.executable, "-m", "spatial_core.jobs", "tune", "--call", str(call)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 90
        while not list((tmp_path / "out" / "trials").glob("*/checkpoint_best.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 3, "two workers and a keeper with its server"
        process.kill()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


def test_the_stages_are_called_by_name(lake: Lake, database: Path, tuned: MakeSettings, tmp_path: Path) -> None:
    settings = tuned("tuning.trials=1", "tuning.max_epochs=1")
    arguments = {
        "merged_dir": str(lake.merged),
        "difficulty": str(lake.difficulty),
        "output_dir": str(tmp_path),
        "storage_file": str(database),
    }
    assert (
        run_stage(StageCall("tune-worker", {**arguments, "worker": "07"}, settings)).artifact.name == "worker_07.json"
    )
    collected = run_stage(StageCall("tune-collect", arguments, settings))
    assert (collected.rows, collected.up_to_date) == (1, False)
    assert run_stage(StageCall("tune-collect", arguments, settings)).up_to_date
    assert run_stage(StageCall("tune", arguments, settings)).up_to_date
