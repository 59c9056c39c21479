"""The storage: which databases are taken, where the URL may lie, waiting for a database, holding to the number."""

from __future__ import annotations

import datetime
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from spatial_core.config.settings import load_settings
from spatial_core.config.tuning import TuningSection
from spatial_core.errors import ConfigError, InputError
from spatial_core.tuning.postgres import embedded_database
from spatial_core.tuning.secrets import read_secret, write_secret
from spatial_core.tuning.storage import PatientStorage, StudyFull, database_of, study_database
from tests.spatial_core.tuning.conftest import MakeSettings, keeper_of

QUICK = TuningSection(heartbeat_s=1, grace_s=2, database_patience_s=30)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("ignore", UserWarning)  # ask() without optimize() has no heartbeat, which is the point
        yield


def secret(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "url"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod 600") as failed:
        read_secret(secret(tmp_path, "postgresql://u:geheim@h/d", mode))
    assert "geheim" not in str(failed.value)


@pytest.mark.parametrize("text", ["", "two words", "not-a-url"])
def test_a_file_without_a_url_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError):
        database_of(secret(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        read_secret(tmp_path / "nowhere")


def test_a_secret_is_never_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o666)
    write_secret(path, "geheim")
    assert (path.stat().st_mode & 0o777, read_secret(path)) == (0o600, "geheim")


def test_sqlite_serves_one_worker_only(tmp_path: Path) -> None:
    file = secret(tmp_path, f"sqlite:///{tmp_path}/studies.db")
    assert database_of(file).get_backend_name() == "sqlite"
    with pytest.raises(ConfigError, match=r"several workers would corrupt.*tuning\.workers to 1"):
        database_of(file, workers=2)


@pytest.mark.parametrize("url", ["redis://localhost/0", "journal:///x.log"])
def test_what_is_no_relational_database_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="relational database"):
        database_of(secret(tmp_path, url))


def test_the_database_is_the_one_that_was_named(tmp_path: Path, tuned: MakeSettings) -> None:
    own = secret(tmp_path, "postgresql://u:p@h/d")
    for settings in (tuned(f"tuning.storage_file={own}"), tuned("tuning.storage_url=postgresql://x@y/z")):
        with study_database(settings, own) as file:
            assert file == own
    with study_database(tuned(f"tuning.storage_file={own}", "tuning.storage_url=postgresql://x@y/z")) as file:
        assert file == own
    with study_database(tuned("tuning.storage_url=sqlite:///relative.db")) as file:
        assert Path(str(database_of(file).database)).is_absolute()
        assert file.stat().st_mode & 0o777 == 0o600
    assert database_of(own).drivername == "postgresql+psycopg"


@pytest.mark.parametrize("url", ["postgresql://user:geheim@host/db", "postgresql://host/db?user=u&password=geheim"])
def test_a_password_in_the_settings_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match=r"storage_file.*\*\*\*") as failed:
        load_settings(overrides=[f"tuning.storage_url={url}"], environ={})
    assert "geheim" not in str(failed.value)


@pytest.mark.parametrize(
    "name", ["", "../up", "a b", "a;rm -rf x", "a'b", "-x", "x" * 65, "ümlaut", "a\nb", "$(id)", "a/b"]
)
def test_a_study_name_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"tuning\.study_name"):
        load_settings(overrides=[f"tuning.study_name='''{name}'''"], environ={})


def test_a_database_that_refuses_is_not_waited_for(database: Path, tmp_path: Path) -> None:
    wrong = secret(tmp_path, read_secret(database).replace("@", "x@"))
    started = time.monotonic()
    with pytest.raises(InputError, match="authentication failed") as failed:
        PatientStorage(wrong, QUICK)
    assert time.monotonic() - started < 10
    assert read_secret(wrong).partition("@")[0].rpartition(":")[2] not in str(failed.value)


def test_a_database_that_is_down_is_waited_for_and_may_have_moved(tmp_path: Path) -> None:
    with embedded_database(tmp_path / "a", TuningSection()) as first:
        pointer = secret(tmp_path, read_secret(first))
        storage = PatientStorage(pointer, QUICK)
        study = optuna.create_study(storage=storage, study_name="before")
        study.enqueue_trial({"x": 1.0})
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.extend(s.study_name for s in storage.get_all_studies()))
    reader.start()
    time.sleep(1)
    assert not found
    with embedded_database(tmp_path / "b", TuningSection()) as second:
        optuna.create_study(storage=PatientStorage(second, QUICK), study_name="after the move")
        write_secret(pointer, read_secret(second))
        reader.join(20)
        assert found == ["after the move"]


@pytest.mark.parametrize("how", [signal.SIGQUIT, signal.SIGKILL])
def test_a_database_that_dies_in_the_middle_of_anything_is_outlasted(tmp_path: Path, how: signal.Signals) -> None:
    lenient = QUICK.model_copy(update={"grace_s": 60})
    with embedded_database(tmp_path / "a", TuningSection()) as file:
        keeper = keeper_of(tmp_path / "a")
        over = threading.Event()

        def objective(trial: optuna.Trial) -> float:
            value = trial.suggest_float("x", 0, 1)
            trial.set_user_attr("seen", True)
            for step in range(3):
                trial.report(value, step)
                trial.should_prune()
            return value

        def work() -> int:
            study = optuna.load_study(study_name="s", storage=PatientStorage(file, lenient))
            while not over.is_set():
                study.optimize(objective, n_trials=1)
            return len(study.trials)

        optuna.create_study(storage=PatientStorage(file, lenient), study_name="s")
        with ThreadPoolExecutor(3) as pool:
            working = [pool.submit(work) for _ in range(3)]
            for _ in range(3):
                time.sleep(1.5)
                for server in keeper.children():
                    server.send_signal(how)
            time.sleep(3)
            over.set()
            assert max(worker.result(60) for worker in working) > 3


def test_patience_ends(tmp_path: Path) -> None:
    nobody = secret(tmp_path, "postgresql://u:p@127.0.0.1:1/d")
    with pytest.raises(InputError, match="refused"):
        PatientStorage(nobody, TuningSection(database_patience_s=0.5))


def test_workers_at_once_never_exceed_the_number(database: Path) -> None:
    quota, workers = 7, 5
    optuna.create_study(storage=PatientStorage(database, QUICK), study_name="quota")
    refused = []

    def work() -> None:
        storage = PatientStorage(database, QUICK)
        storage.quota = quota
        study = optuna.load_study(study_name="quota", storage=storage)
        try:
            for _ in range(quota):
                study.ask()
        except StudyFull:
            refused.append(True)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    study = optuna.load_study(study_name="quota", storage=PatientStorage(database, QUICK))
    assert [trial.number for trial in study.trials] == list(range(quota))
    assert len(refused) == workers


def test_lost_trials_make_room_and_hopeless_ones_do_not(database: Path) -> None:
    storage = PatientStorage(database, QUICK)
    storage.quota = 2
    study = optuna.create_study(storage=storage, study_name="room")
    study.tell(study.ask(), state=TrialState.FAIL)
    hopeless = study.ask()
    hopeless.set_user_attr("error", "diverged")
    study.tell(hopeless, state=TrialState.FAIL)
    study.ask()
    with pytest.raises(StudyFull):
        study.ask()


def test_a_trial_that_never_gave_a_sign_of_life_is_found(database: Path) -> None:
    """Its worker was killed between asking for it and the first heartbeat, which Optuna alone never notices."""
    storage = PatientStorage(database, QUICK)
    study = optuna.create_study(storage=storage, study_name="silent")
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    optuna.storages.fail_stale_trials(study)
    assert study.trials[0].state == TrialState.RUNNING
    waited = datetime.datetime.now() + datetime.timedelta(seconds=2.5)
    while datetime.datetime.now() < waited:
        time.sleep(0.1)
    optuna.storages.fail_stale_trials(study)
    assert [found.state for found in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    assert study.trials[1].params == study.trials[0].params
