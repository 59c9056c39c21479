"""Stage `tune-worker`: runs trials of a study that other workers, here or on other machines, may share.

A trial is a training run like any other, in a folder of its own, tracked as a run of its own. After every validation
its metric goes to the study, which may end it there and then. A worker that is killed costs its study nothing: its
trial is found without sign of life, queued again, and goes on from its latest epoch where its folder can be reached. A
worker that is asked to end queues its trial again itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactBusy, ConfigError, Interrupted, ModelError
from spatial_core.interruption import resumable, stop_here
from spatial_core.metric_learning.checkpoint import BEST, read_record
from spatial_core.metric_learning.training import train_projector
from spatial_core.metric_learning.training_state import STATE
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.atomic import exclusive, write_json
from spatial_core.storage.provenance import Provenance, record_artifact
from spatial_core.tuning.space import suggest
from spatial_core.tuning.storage import ERROR, StudyFull, counts
from spatial_core.tuning.study import CODE_VERSION, Plan, open_study, plan_study
from spatial_core.tuning.trials import WORKER, attempts_before, state_of, tally, trial_record

STAGE = "tune-worker"
_LOG = logging.getLogger(__name__)
_WORKER = re.compile(r"\d{2,4}")
_RECORD = "trial.json"


class _TrialFailed(Exception):
    """A trial came to nothing by its own hyper-parameters; the study goes on."""


class _TrialTaken(Exception):
    """Another worker has taken the trial over."""


def trial_folder(output_dir: Path, number: int) -> Path:
    """Where a trial's checkpoints lie."""
    return output_dir / "trials" / f"trial_{number:05d}"


def tune_worker(  # noqa: PLR0917 - a stage is called by name
    merged_dir: Path,
    difficulty: Path,
    output_dir: Path,
    storage_file: Path,
    worker: str,
    settings: Settings,
    progress: Progress = silent,
) -> Report:
    """Run trials until the study has its number, or this worker has done its share.

    Args:
        merged_dir: folder with `train.parquet` and `val.parquet`.
        difficulty: difficulty table.
        output_dir: folder of the study; trials lie in `trials/`.
        storage_file: file of mode 0600 with the URL of the study's database.
        worker: number of this worker, two digits or more, as in `00`.
        settings: [tuning], and all that training uses.
        progress: called with the trials that the study has.

    Returns:
        Report in trials that this worker began; its artifact is `workers/worker_NN.json`.

    Raises:
        ConfigError: if the settings cannot be tuned.
        InputError: if an input is missing, or the database does not answer.
        ArtifactBusy: if another process runs as the same worker.
        Interrupted: if the worker was asked to stop; its trial waits for the next one.
    """
    started = time.perf_counter()
    if not _WORKER.fullmatch(worker):
        raise ConfigError(f"worker {worker!r}: expected a number of two to four digits, as in 00")
    plan = plan_study(merged_dir, difficulty, settings)
    artifact = output_dir / "workers" / f"worker_{worker}.json"
    with exclusive(artifact), open_study(plan, storage_file) as study:
        with resumable():
            begun = _Worker(worker, plan, study, (merged_dir, difficulty, output_dir), progress).run()
        trials = [trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs.get(WORKER) == worker]
        record = {
            "study": plan.name,
            "worker": worker,
            "machine": socket.gethostname(),
            "trials": [trial_record(trial) for trial in trials],
        }
        write_json(artifact, record)
        states = tally(trials)
        report = Report(
            stage=STAGE,
            artifact=artifact,
            rows=states.get("complete", 0),
            rows_in=len(trials),
            kept=states.get("complete", 0),
            rejected={state: count for state, count in sorted(states.items()) if state != "complete"},
            seconds=time.perf_counter() - started,
            bytes=artifact.stat().st_size,
            unit="trials",
            up_to_date=begun == 0,
            details={"study": plan.name, "worker": worker, "begun_now": begun},
        )
        provenance = Provenance(STAGE, CODE_VERSION, settings.digest, plan.config, plan.inputs)
        record_artifact(artifact, plan.key, provenance, report)
    return report


class _Worker:
    """One worker at work."""

    def __init__(self, name: str, plan: Plan, study: Study, paths: tuple[Path, Path, Path], progress: Progress) -> None:
        self._name = name
        self._plan = plan
        self._study = study
        self._merged_dir, self._difficulty, self._output_dir = paths
        self._progress = progress
        self._taken = False

    def run(self) -> int:
        """Begin trials; returns how many."""
        share = self._plan.settings.tuning.trials_per_worker
        begun = 0
        self._release()  # what a killed worker of this name left: the lock of its artifact says that it is gone
        while not share or begun < share:
            self._taken = False
            try:
                stop_here(f"after {begun} trials")
                self._study.optimize(self._trial, n_trials=1, catch=(_TrialFailed,))
            except StudyFull:
                break
            except (_TrialTaken, ValueError):  # Optuna cannot tell the outcome of a trial that is finished already
                if not self._taken:
                    raise
                _LOG.warning("worker %s: its trial was given up as lost meanwhile; going on with another", self._name)
            except (Interrupted, SystemExit, KeyboardInterrupt):
                self._release()
                raise
            begun += 1
        self._tell("done")
        return begun

    def _release(self) -> None:
        """Queue this worker's unfinished trials again now, rather than after the grace period."""
        trials = self._study.get_trials(deepcopy=False)
        retried = {number for trial in trials for number in attempts_before(trial)}
        retry = self._study._storage.get_heartbeat_stale_trial_callback()  # type: ignore[attr-defined]
        for trial in trials:
            own = trial.user_attrs.get(WORKER) == self._name and trial.number not in retried
            if own and state_of(trial) in {"running", "lost"}:
                self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                retry(self._study, self._study.get_trials(deepcopy=True)[trial.number])

    def _trial(self, trial: Trial) -> float:
        """The objective: the best value of any validation."""
        plan, number = self._plan, trial.number
        trial.set_user_attr(WORKER, self._name)
        parameters = suggest(plan.space, trial)
        settings = plan.trial_settings(number, parameters)
        frozen = self._study._storage.get_trial(trial._trial_id)
        folder = self._folder(frozen, parameters)
        seen: set[int] = set()

        def observer(epoch: int, metrics: Mapping[str, float]) -> bool:
            self._require_own(trial)
            trial.report(metrics[plan.metric], epoch)
            seen.add(epoch)
            # After the last epoch there is nothing to save by ending early.
            return epoch >= settings.training.num_epochs or not trial.should_prune()

        done = self._tell(f"trial {number}")
        try:
            report = train_projector(
                self._merged_dir,
                self._difficulty,
                folder,
                settings,
                lambda _, __, message: self._progress(done, plan.trials, f"trial {number}, {message}"),
                observer=observer,
            )
        except (ModelError, torch.OutOfMemoryError) as error:
            cause = " ".join(str(error).split())
            _LOG.warning("worker %s: trial %d failed: %s", self._name, number, cause)
            trial.set_user_attr(ERROR, cause[:500])
            raise _TrialFailed(cause) from error
        self._require_own(trial)
        self._record(trial, report, folder, seen)
        if report.details["ended_by_observer"]:
            raise optuna.TrialPruned(f"after epoch {report.details['epochs']}")
        return float(report.details["best_metric"])

    def _record(self, trial: Trial, report: Report, folder: Path, seen: set[int]) -> None:
        details = report.details
        for entry in read_record(folder / BEST)["history"]:
            # Killed between the end of training and of the trial, a trial finds itself finished and unreported.
            if "validation" in entry and entry["epoch"] not in seen:
                trial.report(entry["validation"][self._plan.metric], entry["epoch"])
        for name in ("epochs", "best_epoch", "stopped_early", "validation_queries", "validation_images"):
            trial.set_user_attr(name, details[name])
        if details["tracking"] is not None:
            trial.set_user_attr("tracking_run", details["tracking"]["run_id"])
        (folder / STATE).unlink(missing_ok=True)  # three times the size of the head, and of no more use
        _LOG.info(
            "worker %s: trial %d %s after %d epochs, best %s %.4f",
            self._name,
            trial.number,
            "pruned" if details["ended_by_observer"] else "complete",
            details["epochs"],
            self._plan.metric,
            details["best_metric"],
        )

    def _folder(self, trial: FrozenTrial, parameters: Mapping[str, Any]) -> Path:
        """The trial's folder, with what a lost attempt left in its own."""
        folder = trial_folder(self._output_dir, trial.number)
        if folder.exists():  # of an earlier study in this place
            shutil.rmtree(folder)
        for number in reversed(attempts_before(trial)):
            left = trial_folder(self._output_dir, number)
            if self._is_of_study(left):
                with contextlib.suppress(ArtifactBusy), exclusive(left / BEST):
                    left.rename(folder)
                    break
        folder.mkdir(parents=True, exist_ok=True)
        record = {"study": self._plan.name, "number": trial.number, "parameters": parameters}
        write_json(folder / _RECORD, record)
        return folder

    def _is_of_study(self, folder: Path) -> bool:
        record = folder / _RECORD
        return record.is_file() and bool(json.loads(record.read_text())["study"] == self._plan.name)

    def _require_own(self, trial: Trial) -> None:
        """While the database was out of reach for the grace period, others may have taken the trial over."""
        if self._study._storage.get_trial(trial._trial_id).state != TrialState.RUNNING:
            self._taken = True
            raise _TrialTaken(f"trial {trial.number}")

    def _tell(self, message: str) -> int:
        """Report progress; returns the number of trials that the study has."""
        finished = sum(trial.state.is_finished() and counts(trial) for trial in self._study.get_trials(deepcopy=False))
        self._progress(finished, self._plan.trials, message)
        return finished
