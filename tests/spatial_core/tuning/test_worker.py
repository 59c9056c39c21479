"""A worker: the same training code, trials in folders of their own, ended early for real, never lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.study import Study
from optuna.trial import TrialState

from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactBusy, ConfigError
from spatial_core.jobs.registry import StageCall
from spatial_core.metric_learning.checkpoint import BEST, FINAL, load_checkpoint
from spatial_core.metric_learning.training_state import STATE
from spatial_core.report import Report
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.provenance import verify_artifact
from spatial_core.tuning.study import open_study, plan_study
from spatial_core.tuning.trials import state_of
from spatial_core.tuning.worker import trial_folder, tune_worker
from tests.data.make_training_lake import Lake
from tests.spatial_core.tuning.conftest import MakeSettings


def work(lake: Lake, output: Path, database: Path, settings: Settings, worker: str = "00") -> Report:
    return tune_worker(lake.merged, lake.difficulty, output, database, worker, settings)


OpenStudy = Callable[[Settings], Study]


@pytest.fixture
def opened(lake: Lake, database: Path) -> Iterator[OpenStudy]:
    """Opens the study of some settings, for as long as the test lasts."""
    with contextlib.ExitStack() as studies:
        yield lambda settings: studies.enter_context(
            open_study(plan_study(lake.merged, lake.difficulty, settings), database)
        )


def test_a_worker_fills_the_study(lake: Lake, database: Path, tuned: MakeSettings, tmp_path: Path) -> None:
    report = work(lake, tmp_path, database, tuned())
    assert report.artifact == tmp_path / "workers" / "worker_00.json"
    assert (report.rows, report.rows_in, report.kept, report.up_to_date) == (3, 3, 3, False)
    verify_artifact(report.artifact)
    record = json.loads(report.artifact.read_text())
    assert record["study"].startswith("test-a-worker-fills-the-study-")
    for number, trial in enumerate(record["trials"]):
        folder = trial_folder(tmp_path, number)
        assert folder.name == f"trial_{number:05d}"
        history = load_checkpoint(folder / FINAL).history
        values = {str(entry["epoch"]): entry["validation"]["recall@1"] for entry in history}
        assert trial["intermediate_values"] == values
        assert trial["value"] == max(values.values()), "the best validation, not the last"
        head = load_checkpoint(folder / BEST).config
        assert head.hidden_widths[0] == trial["parameters"]["hidden_dim"]
        assert trial["parameters"].keys() == plan_study(lake.merged, lake.difficulty, tuned()).space.keys()
        assert not (folder / STATE).exists(), "what only a running trial needs is gone"
    again = work(lake, tmp_path, database, tuned())
    assert (again.rows, again.up_to_date, again.details["begun_now"]) == (3, True, 0)


def test_a_worker_stops_after_its_share(
    lake: Lake,
    database: Path,
    tuned: MakeSettings,
    tmp_path: Path,
    opened: OpenStudy,
) -> None:
    settings = tuned("tuning.trials_per_worker=1", "tuning.max_epochs=1")
    assert work(lake, tmp_path, database, settings, "00").rows == 1
    assert work(lake, tmp_path, database, settings, "01").rows == 1
    assert len(opened(settings).trials) == 2


def test_every_trial_is_measured_on_the_same_queries(
    lake: Lake, database: Path, tuned: MakeSettings, tmp_path: Path
) -> None:
    overrides = ["training.val_sample_fraction=0.3", "training.retrieval_metric_max_queries=3"]
    work(lake, tmp_path, database, tuned("tuning.max_queries=20", "tuning.max_epochs=1", *overrides))
    trials = json.loads((tmp_path / "workers" / "worker_00.json").read_text())["trials"]
    assert {trial["validation_queries"] for trial in trials} == {20}
    assert {trial["validation_images"] for trial in trials} == {33}, "all of val, whatever a training run samples"


def test_hopeless_trials_are_ended_while_they_train(
    lake: Lake, database: Path, tuned: MakeSettings, tmp_path: Path
) -> None:
    epochs = 8
    settings = tuned(
        "tuning.trials=8",
        f"tuning.max_epochs={epochs}",
        "tuning.pruner=median",
        "tuning.pruner_startup_trials=1",
        "tuning.pruner_warmup_epochs=1",
        "tuning.startup_trials=8",
    )
    report = work(lake, tmp_path, database, settings)
    trials = json.loads(report.artifact.read_text())["trials"]
    pruned = [trial for trial in trials if trial["state"] == "pruned"]
    assert pruned, "with learning rates from 1e-4 to 1e-1 some trials are hopeless"
    assert len(pruned) + report.rows == 8
    trained = 0
    for trial in trials:
        history = load_checkpoint(trial_folder(tmp_path, trial["number"]) / FINAL).history
        trained += len(history)
        assert len(history) == trial["epochs"] == len(trial["intermediate_values"])
        assert (trial["epochs"] < epochs) == (trial["state"] == "pruned"), "a trial that ran to its end is complete"
    assert trained < 8 * epochs


def parameters(lake: Lake, folder: Path, settings: Settings, seed: int) -> list[Any]:
    """Trials of one worker on an SQLite file of its own."""
    folder.mkdir()
    url = folder / "url"
    url.write_text(f"sqlite:///{folder}/studies.db")
    url.chmod(0o600)
    work(lake, folder, url, settings.replaced({"tuning.seed": seed}))
    trials = json.loads((folder / "workers" / "worker_00.json").read_text())["trials"]
    return [(trial["number"], trial["parameters"], trial["value"]) for trial in trials]


def test_the_same_seed_gives_the_same_trials(lake: Lake, tuned: MakeSettings, tmp_path: Path) -> None:
    settings = tuned("tuning.trials=4", "tuning.max_epochs=1", "tuning.startup_trials=2")
    first = parameters(lake, tmp_path / "a", settings, 1)
    assert first == parameters(lake, tmp_path / "b", settings, 1)
    assert first != parameters(lake, tmp_path / "c", settings, 2)
    drawn = [json.dumps(trial[1]) for trial in first]
    assert len(set(drawn)) == 4


def test_a_restarted_worker_draws_no_trial_twice(
    lake: Lake,
    database: Path,
    tuned: MakeSettings,
    tmp_path: Path,
    opened: OpenStudy,
) -> None:
    settings = tuned("tuning.trials=4", "tuning.startup_trials=4", "tuning.max_epochs=1", "tuning.trials_per_worker=2")
    work(lake, tmp_path, database, settings)
    work(lake, tmp_path, database, settings)
    trials = opened(settings).trials
    assert len({json.dumps(trial.params) for trial in trials}) == len(trials) == 4


def test_a_trial_that_diverges_fails_alone_and_counts(
    lake: Lake, database: Path, tuned: MakeSettings, tmp_path: Path
) -> None:
    settings = tuned("tuning.space={learning_rate=[1e38], hidden_dim=[16], batch_size=[8]}", "tuning.trials=2")
    report = work(lake, tmp_path, database, settings)
    assert (report.rows, dict(report.rejected)) == (0, {"failed": 2})
    trials = json.loads(report.artifact.read_text())["trials"]
    assert all("training diverged" in trial["error"] for trial in trials)


def test_values_that_no_setting_accepts_end_the_worker_at_once(
    lake: Lake, database: Path, tuned: MakeSettings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"training_model\.activation"):
        work(lake, tmp_path, database, tuned('tuning.space={activation=["tanh"]}'))


@pytest.mark.parametrize("worker", ["0", "../../x", "00; id", "", "a0", "00000"])
def test_a_worker_that_is_no_number_is_refused(
    lake: Lake, database: Path, tuned: MakeSettings, tmp_path: Path, worker: str
) -> None:
    with pytest.raises(ConfigError, match="expected a number"):
        work(lake, tmp_path, database, tuned(), worker)
    assert not list(tmp_path.iterdir())


def test_no_two_processes_are_the_same_worker(lake: Lake, database: Path, tuned: MakeSettings, tmp_path: Path) -> None:
    with exclusive(tmp_path / "workers" / "worker_00.json"), pytest.raises(ArtifactBusy):
        work(lake, tmp_path, database, tuned())


def running_worker(folder: Path, call: StageCall) -> subprocess.Popen[str]:
    file = folder / "call.json"
    file.write_text(call.to_json())
    command = [sys.executable, "-m", "spatial_core.jobs", call.stage, "--call", str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_is_ended_loses_no_trial(  # noqa: PLR0917 - fixtures
    lake: Lake,
    database: Path,
    tuned: MakeSettings,
    tmp_path: Path,
    how: signal.Signals,
    opened: OpenStudy,
) -> None:
    """Its trial goes on, from its latest epoch, with the next worker; on SIGTERM it says so itself."""
    settings = tuned("tuning.trials=1", "tuning.max_epochs=120", "training.validate_every_n_epochs=1")
    arguments = {
        "merged_dir": str(lake.merged),
        "difficulty": str(lake.difficulty),
        "output_dir": str(tmp_path),
        "storage_file": str(database),
        "worker": "00",
    }
    study = opened(settings)
    process = running_worker(tmp_path, StageCall("tune-worker", arguments, settings))
    deadline = time.monotonic() + 90
    while not any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, how)
    process.communicate(timeout=60)
    (trial,) = study.get_trials()[:1]
    reached = len(trial.intermediate_values)
    assert reached < 120
    if how == signal.SIGTERM:
        assert [state_of(found) for found in study.get_trials()] == ["lost", "waiting"]
    else:
        assert [state_of(found) for found in study.get_trials()] == ["running"]
    shorter = settings.replaced({"tuning.trials": 1})
    report = work(lake, tmp_path, database, shorter)
    first, second = study.get_trials()
    assert (state_of(first), state_of(second)) == ("lost", "complete")
    assert second.params == first.params
    assert len(second.intermediate_values) == 120
    assert not trial_folder(tmp_path, 0).exists(), "its folder went on as that of the second attempt"
    assert report.details["begun_now"] == 1
    checkpoint = json.loads((trial_folder(tmp_path, 1) / "_manifests" / f"{BEST}.json").read_text())
    assert checkpoint["report"]["details"]["resumed_from_epoch"] >= reached - 1


def test_a_trial_that_was_taken_over_meanwhile_is_left_to_the_others(  # noqa: PLR0917 - fixtures
    lake: Lake,
    database: Path,
    tuned: MakeSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opened: OpenStudy,
) -> None:
    """The database was out of reach for longer than the grace period: the others count the trial as lost."""
    settings = tuned("tuning.trials=1")
    study = opened(settings)
    asked = optuna.Trial.should_prune
    taken: list[int] = []

    def interrupted(trial: optuna.Trial) -> bool:
        if not taken:
            taken.append(trial.number)
            study.tell(trial.number, state=TrialState.FAIL)
        return asked(trial)

    monkeypatch.setattr(optuna.Trial, "should_prune", interrupted)
    report = work(lake, tmp_path, database, settings)
    assert [state_of(trial) for trial in study.get_trials()] == ["lost", "complete"]
    assert (report.rows, dict(report.rejected)) == (1, {"lost": 1})


def test_folders_of_another_study_make_way(lake: Lake, database: Path, tuned: MakeSettings, tmp_path: Path) -> None:
    left = trial_folder(tmp_path, 0)
    left.mkdir(parents=True)
    (left / "checkpoint_best.safetensors").write_text("of another study")
    work(lake, tmp_path, database, tuned("tuning.trials=1", "tuning.max_epochs=1"))
    verify_artifact(left / BEST)


def test_a_lost_attempt_whose_folder_is_still_written_to_is_not_taken_over(
    lake: Lake,
    database: Path,
    tuned: MakeSettings,
    tmp_path: Path,
    opened: OpenStudy,
) -> None:
    settings = tuned("tuning.trials=1", "tuning.max_epochs=2")
    study = opened(settings)
    work(lake, tmp_path, database, settings)
    study._storage._backend.quota = None  # type: ignore[attr-defined]
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=study.trials[0].params,
            distributions=study.trials[0].distributions,
            system_attrs={"failed_trial": 0, "retry_history": [0]},
        )
    )
    with exclusive(trial_folder(tmp_path, 0) / BEST):
        work(lake, tmp_path, database, settings.replaced({"tuning.trials": 2}))
    assert trial_folder(tmp_path, 0).exists()
    assert state_of(study.get_trials()[1]) == "complete"
    verify_artifact(trial_folder(tmp_path, 1) / BEST)
