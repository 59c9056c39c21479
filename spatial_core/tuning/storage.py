"""The study's database as Optuna sees it: reached through a file with its URL, and waited for while it is down.

Two gaps of Optuna's are closed here. It counts a trial as lost only after a first sign of life, so a worker killed
just before that would leave a trial running for ever. And it lets every worker draw a last trial at once, so a study
would end with more trials than were asked for.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from spatial_core.config.settings import Settings
from spatial_core.config.tuning import TuningSection
from spatial_core.errors import ConfigError, InputError
from spatial_core.tuning.postgres import embedded_database, is_loopback
from spatial_core.tuning.secrets import URL_FILE, read_secret, write_secret

_LOG = logging.getLogger(__name__)
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 10.0
# Faults that no waiting repairs, by what the database says; drivers give no code for a refused connection.
_HOPELESS = ("authentication failed", "no pg_hba.conf entry", "does not exist", "no such table", "unable to open")
# Workers that open a new database at the same time may see each other's tables appear.
_RACE = "already exists"
ERROR = "error"

_P = ParamSpec("_P")
_R = TypeVar("_R")


class StudyFull(Exception):
    """The study has as many trials as it is to have, finished or under way."""


@contextlib.contextmanager
def study_database(settings: Settings, storage_file: Path | None = None) -> Iterator[Path]:
    """The file with the URL of the database of studies, which is there for the length of the block.

    Args:
        settings: [tuning] names the database, or asks for one of our own in `paths.tuning_dir`.
        storage_file: file with the URL of one that is there already; wins.

    Raises:
        ConfigError: if the database does not fit what is asked of it, or cannot run here.
    """
    tuning = settings.tuning
    named = storage_file or (None if tuning.storage_file is None else settings.absolute(tuning.storage_file))
    folder = settings.locations.tuning_dir
    if named is None and tuning.storage_url is None:
        if settings.compute.profile != "local" and is_loopback(tuning.host):
            _LOG.warning(
                "workers run on a cluster, but tuning.host is %s: only nodes that are this machine reach the study "
                "database",
                tuning.host,
            )
        with embedded_database(folder, tuning) as embedded:
            yield embedded
        return
    if named is None:
        named = folder / URL_FILE
        write_secret(named, _absolute(str(tuning.storage_url), settings))
    database_of(named, workers=tuning.workers)
    yield named


def database_of(storage_file: Path, *, workers: int = 1) -> sqlalchemy.URL:
    """The URL in the file, password included, with the driver that is installed.

    Raises:
        ConfigError: if it is no relational database, or one that several workers cannot share.
        InputError: if the file cannot be read.
    """
    try:
        url = sqlalchemy.make_url(read_secret(storage_file))
    except sqlalchemy.exc.ArgumentError as error:
        raise InputError(f"{storage_file}: does not hold the URL of a database") from error
    kind = url.get_backend_name()
    if kind == "sqlite" and workers > 1:
        raise ConfigError(
            f"{storage_file}: names an SQLite file, which several workers would corrupt on a network file system; set "
            f"tuning.workers to 1, or leave tuning.storage_url unset for a PostgreSQL of our own"
        )
    if kind in {"postgres", "postgresql"} and "+" not in url.drivername:
        url = url.set(drivername="postgresql+psycopg")
    try:
        url.get_dialect()
    except sqlalchemy.exc.NoSuchModuleError as error:
        raise ConfigError(f"{storage_file}: studies are kept in a relational database, not in {kind}") from error
    return url


def _absolute(url: str, settings: Settings) -> str:
    """An SQLite file relative to the settings file, as all paths are."""
    scheme, separator, path = url.partition(":///")
    if not scheme.startswith("sqlite") or not separator or path.startswith("/"):
        return url
    return f"{scheme}:///{settings.absolute(Path(path))}"


def _patient(method: Callable[Concatenate[Any, _P], _R]) -> Callable[Concatenate[Any, _P], _R]:
    """Call a method of the storage again while the database cannot be reached."""

    @functools.wraps(method)
    def call(self: PatientStorage, /, *arguments: _P.args, **named: _P.kwargs) -> _R:
        return self.patiently(lambda: method(self, *arguments, **named))

    return call


class PatientStorage(RDBStorage):
    """Optuna's storage, which waits for its database and holds a study to its number of trials.

    Args:
        storage_file: file with the URL; read again for every new connection, for the database may have moved.
        settings: patience, signs of life, retries.
    """

    def __init__(self, storage_file: Path, settings: TuningSection) -> None:
        self._file = storage_file
        self._patience_s = settings.database_patience_s
        self._state = threading.local()
        self.quota: int | None = None
        url = database_of(storage_file)
        shown = url.set(username=None, password=None, host=None, port=None, query={})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            lost = _Retry(max_retry=settings.max_retries)
            self.patiently(
                lambda: RDBStorage.__init__(
                    self,
                    shown.render_as_string(),
                    # One session at a time, beside it the turn to add a trial and the heartbeat; few stay open.
                    {"creator": self._connect, "pool_pre_ping": True, "pool_size": 1, "max_overflow": 5},
                    heartbeat_interval=settings.heartbeat_s,
                    grace_period=settings.grace_s,
                    heartbeat_stale_trial_callback=lost,
                )
            )

    def patiently(self, call: Callable[[], _R]) -> _R:
        """Repeat a call until the database answers.

        Raises:
            InputError: if it did not for `tuning.database_patience_s`, or refuses for good.
        """
        if getattr(self._state, "inside", False):
            return call()
        self._state.inside, self._state.repeated = True, False
        deadline, wait = time.monotonic() + self._patience_s, _FIRST_WAIT_S
        try:
            while True:
                try:
                    return call()
                except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
                    cause = _cause(error)
                    if not _is_passing(error) or time.monotonic() > deadline:
                        raise InputError(f"the study database ({self._file}): {cause}") from error
                    _LOG.warning("the study database does not answer (%s); trying again in %.1f s", cause, wait)
                    self._state.repeated = True
                    if hasattr(self, "scoped_session"):  # this thread's; it remembers a transaction that is lost
                        self.scoped_session.remove()
                    time.sleep(wait * random.uniform(0.8, 1.2))
                    wait = min(2 * wait, _LONGEST_WAIT_S)
        finally:
            self._state.inside = False

    def close(self) -> None:
        """Close this process's connections."""
        self.scoped_session.remove()
        self.engine.dispose()

    def _connect(self) -> Any:
        url = database_of(self._file)
        dialect = url.get_dialect()
        arguments, options = dialect().create_connect_args(url)
        if url.get_backend_name() == "postgresql":
            options = {"connect_timeout": 10, "application_name": "spatial-tuning", **options}
        elif url.get_backend_name() == "sqlite":
            options = {"timeout": 60, **options}
        return dialect.import_dbapi().connect(*arguments, **options)

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        """Add a trial; Optuna's cache calls this one.

        Raises:
            StudyFull: if the study has its number of trials.
        """
        with self._turn(study_id):
            if self.quota is not None:
                trials = self.get_all_trials(study_id, deepcopy=False)
                if sum(counts(trial) for trial in trials) >= self.quota:
                    raise StudyFull
            return super()._create_new_trial(study_id, template_trial)

    @contextlib.contextmanager
    def _turn(self, study_id: int) -> Iterator[None]:
        """One worker at a time counts and adds; the lock is the database's, which drops it with the connection."""
        with self.engine.connect() as connection:
            if self.engine.dialect.name == "postgresql":
                connection.execute(sqlalchemy.text("select pg_advisory_xact_lock(19, :study)"), {"study": study_id})
            yield

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        """Set the state; a repetition whose first attempt did arrive is no second change."""
        try:
            return super().set_trial_state_values(trial_id, state, values)
        except UpdateFinishedTrialError:
            if self._state.repeated and self.get_trial(trial_id).state == state:
                return True
            raise

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Trials without sign of life, those that never gave one included."""
        stale = super()._get_stale_trial_ids(study_id)
        limit = datetime.now() - timedelta(seconds=self.grace_period or 0)
        silent = {
            trial._trial_id
            for trial in self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
            if trial.datetime_start is not None and trial.datetime_start < limit
        } - set(stale)
        if silent:
            with self.engine.connect() as connection:
                alive = set(connection.execute(sqlalchemy.text("select trial_id from trial_heartbeats")).scalars())
            stale += sorted(silent - alive)
        return stale


class _Retry(RetryHeartbeatStaleTrialCallback):
    """A lost trial is queued again, unless another has taken its place meanwhile."""

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        with contextlib.suppress(StudyFull):
            super().__call__(study, trial)


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of the study's number: all but the lost ones, which others replace.

    A trial that failed by itself, because its hyper-parameters were hopeless, does count; it says so in `error`.
    """
    return trial.state != TrialState.FAIL or ERROR in trial.user_attrs


def _is_passing(error: Exception) -> bool:
    found = error.__cause__ if isinstance(error, StorageInternalError) else error
    text = str(found)
    if any(words in text for words in _HOPELESS):
        return False
    if isinstance(
        found, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError | sqlalchemy.exc.PendingRollbackError
    ):
        return True
    return isinstance(found, sqlalchemy.exc.DBAPIError) and (found.connection_invalidated or _RACE in text)


def _cause(error: Exception) -> str:
    """What the driver said, in one line; it never names the password."""
    found = error.__cause__ if isinstance(error, StorageInternalError) else error
    original = getattr(found, "orig", None) or found
    return " ".join(str(original).split())[:300]


# Every method through which Optuna reaches the database, its cache's ways included.
_CALLS = (
    "create_new_study", "set_study_user_attr", "set_study_system_attr", "get_study_id_from_name",
    "get_study_name_from_id", "get_study_directions", "get_study_user_attrs", "get_study_system_attrs",
    "get_all_studies", "create_new_trial", "_create_new_trial", "set_trial_param", "_set_trial_param",
    "get_trial_id_from_study_id_trial_number", "get_trial_param", "set_trial_state_values",
    "set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr", "get_trial", "get_all_trials",
    "_get_trials", "get_best_trial", "_get_best_trial_id", "record_heartbeat", "_get_stale_trial_ids",
)  # fmt: skip
for _name in _CALLS:
    setattr(PatientStorage, _name, _patient(getattr(PatientStorage, _name)))
