"""Stage `tune`: a whole study on this machine, workers as processes side by side, and what it came to as `study.json`.

Workers end when the study is full. One that is killed leaves its trial to the others; when all have ended and trials
are still wanting, the lost ones are counted as such and another round of workers finishes them.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import optuna
from optuna.study import Study
from optuna.trial import TrialState

from spatial_core.config.settings import Settings
from spatial_core.errors import StageFailed
from spatial_core.jobs.registry import StageCall, sharing_cores
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.provenance import finished
from spatial_core.tuning.collect import ARTIFACT, collect_study
from spatial_core.tuning.storage import counts, study_database
from spatial_core.tuning.study import STAGE, Plan, open_study, plan_study

_LOG = logging.getLogger(__name__)
_LOOK_S = 1.0
_POLL_S = 0.1
_GRACE_S = 15.0
_TAIL_LINES = 5
# Before the one line in which a process of `spatial_core.jobs` says why it failed.
_STATED = " ERROR spatial_core.jobs: "


def tune(
    merged_dir: Path,
    difficulty: Path,
    output_dir: Path,
    settings: Settings,
    progress: Progress = silent,
    *,
    storage_file: Path | None = None,
) -> Report:
    """Search hyper-parameters with `tuning.workers` processes on this machine.

    A study that was cut short goes on; one that is asked for more trials gets them.

    Args:
        merged_dir: folder with `train.parquet` and `val.parquet`.
        difficulty: difficulty table.
        output_dir: folder of the study.
        settings: [tuning], and all that training uses.
        progress: called with finished trials.
        storage_file: file of mode 0600 with the URL of the study's database; default as [tuning] says.

    Returns:
        Report of `study.json`, see `collect_study`.

    Raises:
        ConfigError: if the settings cannot be tuned, or the database does not fit them.
        InputError: if an input is missing, or the database does not answer.
        StageFailed: if no worker ran a trial to its end.
        ArtifactBusy: if another process tunes here.
    """
    arguments = {"merged_dir": str(merged_dir), "difficulty": str(difficulty), "output_dir": str(output_dir)}
    if storage_file is not None:
        arguments["storage_file"] = str(storage_file)
    return conduct(StageCall(STAGE, arguments, settings), _run_side_by_side, progress)


RunWorkers = Callable[[dict[str, StageCall]], Mapping[str, str]]


def conduct(call: StageCall, run_workers: RunWorkers, progress: Progress) -> Report:
    """A whole study, wherever its workers run.

    Args:
        call: of the stage `tune`.
        run_workers: runs the calls of some workers, by worker, side by side; returns when all have ended, in whatever
            way, why those failed that did. What they found is in the study.
        progress: called with finished trials.

    Raises:
        SpatialError: as `tune` does.
    """
    started = time.perf_counter()
    settings, given = call.settings, {name: Path(value) for name, value in call.arguments.items()}
    merged_dir, difficulty, output_dir = given["merged_dir"], given["difficulty"], given["output_dir"]
    plan = plan_study(merged_dir, difficulty, settings)
    with exclusive(output_dir / "workers"):
        if (done := finished(output_dir / ARTIFACT, plan.key)) is not None and not _wanting_in(done):
            return done
        with study_database(settings, given.get("storage_file")) as database, open_study(plan, database) as study:
            arguments = {**call.arguments, "storage_file": str(database)}
            failures: dict[str, str] = {}
            for names in rounds(study, plan, failures):
                progress(finished_trials(study), plan.trials, f"study {plan.name}, {len(names)} workers")
                calls = {name: StageCall("tune-worker", {**arguments, "worker": name}, settings) for name in names}
                with _watched(study, plan, progress):
                    failures.update(run_workers(calls))
            return collect_study(merged_dir, difficulty, output_dir, database, settings, progress, started=started)


def rounds(study: Study, plan: Plan, failures: Mapping[str, str]) -> Iterator[list[str]]:
    """Names of the workers to run, round after round, until the study has its trials; each is run before the next.

    Args:
        study: in its database.
        plan: what it is to be.
        failures: why workers failed that did, for the message.

    Raises:
        StageFailed: if a round finished no trial.
    """
    tuning = plan.settings.tuning
    wanting = plan.trials - finished_trials(study)
    while wanting > 0:
        yield [f"{number:02d}" for number in range(min(tuning.workers, wanting))]
        left = plan.trials - finished_trials(study)
        if left and left == wanting:
            causes = "; ".join(f"worker {name}: {cause}" for name, cause in failures.items())
            raise StageFailed(
                f"study {plan.name}: no worker finished a trial, {left} of {plan.trials} are wanting"
                f"{causes and f' ({causes})'}"
            )
        wanting = left
        if wanting and tuning.trials_per_worker:
            _LOG.warning("study %s: workers did their share; %d trials are wanting, tune again", plan.name, wanting)
            return
        if wanting:
            _give_up_lost_trials(study, tuning.grace_s + 2 * tuning.heartbeat_s)


def finished_trials(study: Study) -> int:
    """Trials of the study's number that are over."""
    return sum(trial.state.is_finished() and counts(trial) for trial in study.get_trials(deepcopy=False))


def _give_up_lost_trials(study: Study, patience_s: float) -> None:
    """Wait until trials of workers that are gone count as lost; those of workers elsewhere go on."""
    deadline = time.monotonic() + patience_s
    while study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) and time.monotonic() < deadline:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
        time.sleep(_LOOK_S)


def _wanting_in(done: Report) -> bool:
    states = done.details["states"]
    over = sum(states.get(state, 0) for state in ("complete", "pruned", "failed"))
    return bool(over < done.details["wanted"])


@contextmanager
def _watched(study: Study, plan: Plan, progress: Progress) -> Iterator[None]:
    """Report the number of finished trials whenever it changes."""
    over = threading.Event()

    def look() -> None:
        last = -1
        while not over.wait(_LOOK_S):
            if (count := finished_trials(study)) != last:
                last = count
                progress(count, plan.trials, f"study {plan.name}")

    watcher = threading.Thread(target=look, name="study-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(_GRACE_S)


def _run_side_by_side(calls: dict[str, StageCall]) -> Mapping[str, str]:
    """Run stage calls as processes of their own until all have ended; returns why those failed that did.

    Their standard input is a pipe that is never written to: it closes when this process dies in whatever way, and they
    then end too.
    """
    with tempfile.TemporaryDirectory(prefix="spatial-tune-") as folder, ExitStack() as running:
        workers = {}
        for name, call in calls.items():
            file = Path(folder) / f"{name}.json"
            file.write_text(sharing_cores(call, len(calls)).to_json())
            command = [sys.executable, "-m", "spatial_core.jobs", call.stage, "--call", str(file)]
            process = subprocess.Popen(
                [*command, "--until-stdin-closes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            running.callback(_end, process)
            tail: deque[str] = deque(maxlen=_TAIL_LINES)
            reader = threading.Thread(target=_pass_on, args=(name, process.stderr, tail), daemon=True)
            reader.start()
            workers[name] = (process, reader, tail)
        while any(process.poll() is None for process, _, _ in workers.values()):
            time.sleep(_POLL_S)
        failures = {}
        for name, (process, reader, tail) in workers.items():
            reader.join(_GRACE_S)
            if process.returncode:
                failures[name] = _cause(process.returncode, tail)
                _LOG.warning("worker %s failed: %s", name, failures[name])
    return failures


def _cause(code: int, tail: Iterable[str]) -> str:
    """Why a worker failed, from what it said last."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    stated = [line.rpartition(_STATED)[2] for line in tail if _STATED in line]
    return stated[-1] if stated else f"ended with code {code}: {' | '.join(tail)}"


def _pass_on(name: str, lines: IO[str] | None, tail: deque[str]) -> None:
    for line in lines or ():
        tail.append(line.strip())
        sys.stderr.write(f"worker {name}: {line}")


def _end(process: subprocess.Popen[str]) -> None:
    """Ask a worker to end, so that it queues its trial again; then end it with everything it started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stderr):
        if stream is not None:
            stream.close()
