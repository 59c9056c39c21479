"""Tracking of a training run in MLflow: parameters, metrics by epoch, the best checkpoint's record.

Tracking never stops training. What cannot be delivered is kept and sent with the next epoch, at most once a minute
while the server does not answer, and once more at the end; what is lost then is counted in the report. A resumed run
goes on in its MLflow run, and every epoch is there exactly once.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from spatial_core.config.settings import Settings

_LOG = logging.getLogger(__name__)
_RETRY_S = 60.0
# MLflow's own defaults retry a dead server for minutes; a training step should not wait that long.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "DO_NOT_TRACK": "true",
}
_MARK = "train_loss"
_SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Tracking:
    """Where runs are tracked.

    Args:
        uri: MLflow tracking URI.
        experiment: experiment name.
        run_name: run name.
        artifact_root: folder for files when `uri` is a database; a server keeps its own.
    """

    uri: str
    experiment: str
    run_name: str
    artifact_root: Path


def tracking_of(settings: Settings) -> Tracking | None:
    """Tracking as [logging] asks for it, or None when it is turned off."""
    logging_, data_dir = settings.logging, settings.locations.data_dir
    if not logging_.wandb_enabled:
        return None
    return Tracking(
        uri=logging_.mlflow_tracking_uri or f"sqlite:///{data_dir / 'mlflow.db'}",
        experiment=logging_.mlflow_experiment or logging_.wandb_project or "spatial-embeddings",
        run_name=logging_.wandb_run_name or f"train-{settings.digest[:8]}",
        artifact_root=data_dir / "mlflow-artifacts",
    )


Status = Literal["FINISHED", "FAILED", "KILLED"]


def without_password(uri: str) -> str:
    """The URI without user name and password, fit to be shown."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


class Tracker:
    """One training run in MLflow, or nowhere.

    Args:
        tracking: where; None tracks nothing, and every method then does nothing.
    """

    def __init__(self, tracking: Tracking | None) -> None:
        self._tracking = tracking
        self._pending: list[Callable[[Any, str], None]] = []
        self._params: Mapping[str, Any] = {}
        self._client: Any = None
        self._retry_at = 0.0
        self.run_id: str | None = None
        self.failures = 0
        self.undelivered = 0

    def start(
        self, params: Mapping[str, Any], run_id: str | None = None, history: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Open a run, or go on with `run_id`, adding the epochs of `history` that it lacks."""
        self.run_id = run_id
        self._params = params
        self._pending.append(lambda client, run: _log_missing(client, run, history))
        self._deliver()

    def log(self, entry: Mapping[str, Any]) -> None:
        """Add one epoch of the history."""
        metrics, step, now = _numbers(entry), int(entry["epoch"]), _now_ms()
        self._pending.append(lambda client, run: _log_metrics(client, run, metrics, step, now))
        if time.monotonic() >= self._retry_at:
            self._deliver()

    def finish(self, artifacts: Sequence[Path] = (), *, status: Status = "FINISHED") -> None:
        """Add files and close the run; KILLED is one that was interrupted and goes on when it is started again."""
        for path in artifacts:
            self._pending.append(lambda client, run, path=path: client.log_artifact(run, str(path)))  # type: ignore[misc]
        self._pending.append(lambda client, run: client.set_terminated(run, status))
        self._deliver()
        self.undelivered = len(self._pending) if self._tracking is not None else 0

    def describe(self) -> dict[str, Any] | None:
        """URI without password, experiment, run id and failures, for the report; None when nothing is tracked."""
        if self._tracking is None:
            return None
        return {
            "uri": without_password(self._tracking.uri),
            "experiment": self._tracking.experiment,
            "run_id": self.run_id,
            "failures": self.failures,
            "undelivered": self.undelivered,
        }

    def _deliver(self) -> None:
        if self._tracking is None:
            self._pending.clear()
            return
        try:
            with _environment():
                if self._client is None:
                    with _alone_with(self._tracking.uri):
                        self._connect(self._tracking)
                while self._pending:
                    self._pending[0](self._client, str(self.run_id))
                    del self._pending[0]
        except Exception as error:  # noqa: BLE001 - whatever a tracking server does, training goes on
            self.failures += 1
            self._retry_at = time.monotonic() + _RETRY_S
            cause = " ".join(str(error).split())[:200].replace(self._tracking.uri, without_password(self._tracking.uri))
            _LOG.warning("MLflow at %s: %s; training goes on", without_password(self._tracking.uri), cause)

    def _connect(self, tracking: Tracking) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        is_database = "sql" in urlsplit(tracking.uri).scheme
        client = MlflowClient(tracking_uri=tracking.uri)
        if self.run_id is not None:
            try:
                client.update_run(self.run_id, status="RUNNING")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self.run_id = None  # the database was replaced in the meantime
        if self.run_id is None:
            found = client.get_experiment_by_name(tracking.experiment)
            location = tracking.artifact_root.absolute().as_uri() if is_database else None
            experiment = (
                client.create_experiment(tracking.experiment, artifact_location=location)
                if found is None
                else found.experiment_id
            )
            self.run_id = client.create_run(experiment, run_name=tracking.run_name).info.run_id
            client.log_batch(self.run_id, params=[Param(name, str(value)) for name, value in self._params.items()])
        self._client = client


def _log_metrics(client: Any, run: str, metrics: Mapping[str, float], step: int, now: int) -> None:
    from mlflow.entities import Metric

    client.log_batch(run, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])


def _log_missing(client: Any, run: str, history: Sequence[Mapping[str, Any]]) -> None:
    if not history:
        return
    present = {metric.step for metric in client.get_metric_history(run, _MARK)}
    for entry in history:
        if entry["epoch"] not in present:
            _log_metrics(client, run, _numbers(entry), int(entry["epoch"]), _now_ms())


def _numbers(entry: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a history entry, nested ones as `outer/inner`, with the characters that MLflow allows."""
    found: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found[f"{prefix}{name}".replace("@", "_at_")] = float(value)
    return found


def _now_ms() -> int:
    return int(time.time() * 1000)


@contextlib.contextmanager
def _alone_with(uri: str) -> Iterator[None]:
    """Runs that start together would each make the tables of a new SQLite database, and lose the race for some."""
    if not uri.startswith(_SQLITE):
        yield
        return
    path = Path(uri.removeprefix(_SQLITE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """MLflow reads these from the environment only; what the user set stays."""
    added = [name for name in _ENVIRONMENT if name not in os.environ]
    os.environ.update({name: _ENVIRONMENT[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
