"""Runs in a real SQLite store and on a real MLflow server, and training without either."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spatial_core.config.settings import load_settings
from spatial_core.errors import Interrupted, ModelError, SpatialError
from spatial_core.metric_learning import tracking
from spatial_core.metric_learning.tracking import Tracker, Tracking, tracking_of, without_password
from spatial_core.metric_learning.training import train_projector
from spatial_core.report import Progress, Report, silent
from tests.data.make_training_lake import DEFAULTS, Lake, train_settings

HISTORY = [{"epoch": epoch, "train_loss": 1.0 / epoch, "validation": {"recall@1": 0.1 * epoch}} for epoch in (1, 2, 3)]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store; making one takes seconds, so the tests share it, each with an experiment of its own."""
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def steps(uri: str, run: str, metric: str) -> dict[int, float]:
    history = client(uri).get_metric_history(run, metric)
    assert len({entry.step for entry in history}) == len(history), "every epoch is there once"
    return {entry.step: entry.value for entry in history}


def train(lake: Lake, uri: str, experiment: str, *overrides: str, progress: Progress = silent) -> Report:
    settings = train_settings(
        "logging.wandb_enabled=true",
        f"logging.mlflow_tracking_uri={uri}",
        f"logging.mlflow_experiment={experiment}",
        f"paths.data_dir={lake.output.parent}",
        *overrides,
    )
    return train_projector(lake.merged, lake.difficulty, lake.output, settings, progress)


def test_a_run_is_in_the_store_with_parameters_metrics_and_the_best_record(lake: Lake, store: Path) -> None:
    uri = f"sqlite:///{store}"
    report = train(lake, uri, "whole", "logging.wandb_run_name=first")
    told = report.details["tracking"]
    assert (told["failures"], told["undelivered"], told["experiment"]) == (0, 0, "whole")
    run = client(uri).get_run(told["run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params["training.margin"] == "0.5"
    assert run.data.params["config_digest"]
    assert set(steps(uri, told["run_id"], "train_loss")) == {1, 2, 3}
    assert steps(uri, told["run_id"], "validation/recall_at_1")[report.details["best_epoch"]] == pytest.approx(
        report.details["metrics"]["recall@1"]
    )
    assert set(steps(uri, told["run_id"], "band_shares/0")) == {1, 2, 3}
    stored = [entry.path for entry in client(uri).list_artifacts(told["run_id"])]
    assert stored == ["checkpoint_best.json"]
    assert (lake.output.parent / "mlflow-artifacts").is_dir()
    prolonged = train(lake, uri, "whole", "training.num_epochs=5")
    assert prolonged.details["tracking"]["run_id"] == told["run_id"]
    assert set(steps(uri, told["run_id"], "train_loss")) == {1, 2, 3, 4, 5}
    assert client(uri).get_run(told["run_id"]).info.status == "FINISHED"


@pytest.mark.parametrize(("error", "status"), [(Interrupted("enough"), "KILLED"), (ModelError("nan"), "FAILED")])
def test_an_interrupted_run_is_no_failed_one(error: SpatialError, status: str, lake: Lake, store: Path) -> None:
    def stop(done: int, total: int | None, message: str) -> None:
        if message.startswith("epoch 2"):
            raise error

    uri, experiment = f"sqlite:///{store}", f"ended {status}"
    with pytest.raises(type(error)):
        train(lake, uri, experiment, "logging.log_every_n_batches=1", progress=stop)
    (run,) = client(uri).search_runs([client(uri).get_experiment_by_name(experiment).experiment_id])
    assert run.info.status == status
    again = train(lake, uri, experiment)
    assert again.details["tracking"]["run_id"] == run.info.run_id
    assert client(uri).get_run(run.info.run_id).info.status == "FINISHED"


def tracker(uri: str, experiment: str, root: Path) -> Tracker:
    return Tracker(Tracking(uri, experiment, "run", root / "artifacts"))


def test_epochs_a_killed_run_did_not_deliver_are_added_once(store: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{store}"
    first = tracker(uri, "gap", tmp_path)
    first.start({"a": 1})
    first.log(HISTORY[0])
    second = tracker(uri, "gap", tmp_path)
    second.start({"a": 1}, first.run_id, HISTORY)
    second.finish()
    assert second.run_id == first.run_id
    assert steps(uri, str(first.run_id), "train_loss") == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3)}


def test_a_run_that_is_unknown_to_the_store_becomes_a_new_one(store: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{store}"
    made = tracker(uri, "replaced", tmp_path)
    made.start({"a": 1}, "0" * 32, HISTORY)
    made.finish(status="FAILED")
    assert made.run_id != "0" * 32
    run = client(uri).get_run(made.run_id)
    assert (run.info.status, run.data.params) == ("FAILED", {"a": "1"})
    assert set(steps(uri, str(made.run_id), "train_loss")) == {1, 2, 3}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def server(store: Path, port: int) -> Iterator[str]:
    """A real `mlflow server` on loopback over the shared store."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{store}", "--artifacts-destination", str(store.parent / "served")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    log = (store.parent / "server.log").open("ab")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                assert process.poll() is None, (store.parent / "server.log").read_text()[-2000:]
                time.sleep(0.25)
        else:
            pytest.fail((store.parent / "server.log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(20)
        log.close()


@pytest.mark.slow
def test_a_real_server_that_goes_away_and_comes_back_has_every_epoch_once(
    lake: Lake, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_RETRY_S", 0.0)
    port = free_port()
    with server(store, port) as uri:
        report = train(lake, uri, "served")
        told = report.details["tracking"]
        assert (told["failures"], told["uri"]) == (0, uri)
        assert set(steps(uri, told["run_id"], "train_loss")) == {1, 2, 3}
        assert [entry.path for entry in client(uri).list_artifacts(told["run_id"])] == ["checkpoint_best.json"]
        made = tracker(uri, "served", lake.output.parent)
        made.start({"a": 1})
        made.log(HISTORY[0])
    made.log(HISTORY[1])
    assert made.failures == 1
    with server(store, port) as uri:
        made.log(HISTORY[2])
        made.finish()
        assert made.describe() is not None
        assert (made.failures, made.undelivered) == (1, 0)
        assert set(steps(uri, str(made.run_id), "train_loss")) == {1, 2, 3}


def test_training_ends_well_without_its_server_and_says_what_was_lost(
    lake: Lake, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    report = train(lake, uri, "nowhere")
    told = report.details["tracking"]
    assert told["failures"] == 2, "at the start and at the end; in between a minute had not passed"
    assert told["undelivered"] > 0
    assert told["run_id"] is None
    assert report.artifact.is_file()
    assert "training goes on" in caplog.text
    assert "secret" not in caplog.text + str(report.to_json())


def test_where_runs_are_tracked(tmp_path: Path) -> None:
    def told(*overrides: str) -> Tracking | None:
        return tracking_of(load_settings(DEFAULTS, [f"paths.data_dir={tmp_path}", *overrides], environ={}))

    assert told("logging.wandb_enabled=false") is None
    default = told()
    assert default is not None
    assert default.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert default.experiment == "spatial-embeddings"
    assert default.run_name.startswith("train-")
    old = told("logging.wandb_project=p", "logging.wandb_run_name=r")
    assert old is not None
    assert (old.experiment, old.run_name) == ("p", "r")
    new = told("logging.wandb_project=p", "logging.mlflow_experiment=e", "logging.mlflow_tracking_uri=http://h:1")
    assert new is not None
    assert (new.experiment, new.uri) == ("e", "http://h:1")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://user:pass@host:5000/x", "https://host:5000/x"),
        ("postgresql://u:p@db/mlflow", "postgresql://db/mlflow"),
        ("sqlite:////tmp/a@b.db", "sqlite:////tmp/a@b.db"),
        ("http://host", "http://host"),
    ],
)
def test_passwords_are_not_shown(uri: str, shown: str) -> None:
    assert without_password(uri) == shown


def test_nothing_is_imported_or_kept_when_tracking_is_off() -> None:
    off = Tracker(None)
    off.start({"a": 1})
    off.log(HISTORY[0])
    off.finish([Path("nowhere")])
    assert off.describe() is None
    code = "import sys, spatial_core.metric_learning.training; print('mlflow' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
