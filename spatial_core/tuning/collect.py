"""Stage `tune-collect`: everything a study found -> `study.json`, the artifact that training takes its advice from.

The database is where a study lives while it is searched; the file is what it came to. Beside it lies `study.html`, the
same for people.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.importance import get_param_importances
from optuna.study import Study

from spatial_core.config.settings import Settings
from spatial_core.metric_learning.best_trial import FORMAT
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.atomic import atomic_file, exclusive, write_json
from spatial_core.storage.provenance import Provenance, finished, record_artifact
from spatial_core.tuning.page import PAGE, render_page
from spatial_core.tuning.space import FIXED, describe
from spatial_core.tuning.study import CODE_VERSION, STAGE, Plan, open_study, plan_study
from spatial_core.tuning.trials import state_of, tally, trial_record
from spatial_core.tuning.worker import trial_folder

ARTIFACT = "study.json"
# With fewer completed trials an importance says more about chance than about the hyper-parameter.
_ENOUGH = 10


def collect_study(  # noqa: PLR0917 - a stage is called by name
    merged_dir: Path,
    difficulty: Path,
    output_dir: Path,
    storage_file: Path,
    settings: Settings,
    progress: Progress = silent,
    *,
    started: float | None = None,
) -> Report:
    """Write down a study as it is in its database.

    Args:
        merged_dir: folder with `train.parquet` and `val.parquet`, as the trials read it.
        difficulty: difficulty table, as the trials read it.
        output_dir: folder of the study.
        storage_file: file of mode 0600 with the URL of the study's database.
        settings: [tuning], and all that training uses: they name the study.
        progress: called once.
        started: `time.perf_counter()` when the study was begun, where this ends it; default now.

    Returns:
        Report in trials, kept those completed; its artifact is `study.json`.

    Raises:
        ConfigError: if the settings cannot be tuned.
        InputError: if an input is missing, or the database does not answer.
    """
    started = time.perf_counter() if started is None else started
    plan = plan_study(merged_dir, difficulty, settings)
    artifact = output_dir / ARTIFACT
    with exclusive(artifact), open_study(plan, storage_file) as study:
        record = study_record(study, plan, settings)
        progress(len(record["trials"]), len(record["trials"]), "trials collected")
        states = tally(study.get_trials(deepcopy=False))
        report = Report(
            stage=STAGE,
            artifact=artifact,
            rows=len(record["trials"]),
            rows_in=len(record["trials"]),
            kept=states.get("complete", 0),
            rejected={state: count for state, count in sorted(states.items()) if state != "complete"},
            seconds=time.perf_counter() - started,
            unit="trials",
            details={name: record[name] for name in ("study", "metric", "best", "evaluation", "importances")}
            | {
                "best_value": (record["best"] or {}).get("value"),
                "states": states,
                "wanted": plan.trials,
                "page": str(output_dir / PAGE),
            },
        )
        if _is_same(artifact, record) and (done := finished(artifact, plan.key)) is not None:
            return done
        write_json(artifact, record)
        report = replace(report, bytes=artifact.stat().st_size)
        with atomic_file(output_dir / PAGE) as temporary:
            temporary.write_text(render_page(record), encoding="utf-8")
        _remove_trials_of_others(output_dir, study)
        provenance = Provenance(STAGE, CODE_VERSION, settings.digest, plan.config, plan.inputs)
        record_artifact(artifact, plan.key, provenance, report)
    return report


def study_record(study: Study, plan: Plan, settings: Settings) -> dict[str, Any]:
    """The study as JSON; the same for the same trials."""
    trials = [trial_record(trial) for trial in study.get_trials(deepcopy=False)]
    complete = [trial for trial in trials if trial["state"] == "complete"]
    best = max(complete, key=lambda trial: (trial["value"], -trial["number"]), default=None)
    shown = ("number", "value", "parameters", "epochs", "best_epoch", "seconds")
    return {
        "format": FORMAT,
        "study": plan.name,
        "direction": "maximize",
        "metric": plan.metric,
        "trials": trials,
        "best": None if best is None else {name: best[name] for name in shown},
        "importances": _importances(study, len(complete)),
        "space": describe(plan.space),
        "evaluation": {
            FIXED: settings.tuning.max_queries,
            "queries": best and best["validation_queries"],
            "images": best and best["validation_images"],
        },
        "provenance": asdict(Provenance(STAGE, CODE_VERSION, settings.digest, plan.config, plan.inputs)),
    }


def _importances(study: Study, complete: int) -> dict[str, float] | None:
    """Share of each hyper-parameter in what sets good trials apart (PED-ANOVA); None with too few trials."""
    values = {trial.value for trial in study.get_trials(deepcopy=False) if state_of(trial) == "complete"}
    if complete < _ENOUGH or len(values) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return {name: round(share, 6) for name, share in get_param_importances(study).items()}


def _is_same(artifact: Path, record: dict[str, Any]) -> bool:
    return artifact.is_file() and json.loads(artifact.read_bytes()) == json.loads(json.dumps(record))


def _remove_trials_of_others(output_dir: Path, study: Study) -> None:
    """Checkpoints of a study that lay here before would be mixed up with those of this one."""
    own = {trial_folder(output_dir, trial.number) for trial in study.get_trials(deepcopy=False)}
    for folder in (output_dir / "trials").glob("trial_*"):
        if folder not in own:
            shutil.rmtree(folder)
