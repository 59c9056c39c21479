"""What a study is: its name, its identity, and how Optuna searches it.

All trials of a study can be compared: same inputs, same fixed settings, same evaluation set, same number of epochs,
same space. These are its identity, whose digest is part of its name; with others a study of another name begins. More
trials than before, another database or another number of workers leave it the same study.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError
from spatial_core.metric_learning.best_trial import TUNABLE
from spatial_core.metric_learning.training import training_config, training_inputs
from spatial_core.storage.provenance import stage_key
from spatial_core.tuning.space import FIXED, Space, describe, space_of
from spatial_core.tuning.storage import PatientStorage

STAGE = "tune"
CODE_VERSION = "1"
_METRIC = re.compile(r"recall@[1-9]\d*")
# What a trial takes from [tuning], or what does not matter to it.
_OWN = {
    "training.num_epochs",
    "training.save_every_n_epochs",
    "training.selection_metric",
    "training.retrieval_metric_max_queries",
    "training.val_sample_fraction",
    "training.val_sample_buildings",
}
_IDENTITY = (
    "tuning.max_epochs",
    "tuning.metric",
    "tuning.max_queries",
    "tuning.val_sample_fraction",
    "tuning.startup_trials",
    "tuning.pruner",
    "tuning.pruner_startup_trials",
    "tuning.pruner_warmup_epochs",
    "tuning.space",
)


@dataclass(frozen=True)
class Plan:
    """A study to be made, or to be continued.

    Args:
        name: of the study in its database.
        trials: how many it is to have.
        metric: what is maximised.
        space: what is searched.
        seed: of the search.
        settings: of every trial, but for the hyper-parameters that are searched.
        config: the settings that the study depends on, by dotted name.
        inputs: digests of what trials are trained and validated on.
    """

    name: str
    trials: int
    metric: str
    space: Space
    seed: int
    settings: Settings
    config: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def key(self) -> str:
        """Identity of the finished study, its number of trials included."""
        return stage_key(STAGE, CODE_VERSION, self.config, self.inputs)

    def trial_settings(self, number: int, parameters: Mapping[str, Any]) -> Settings:
        """Settings of one trial.

        Raises:
            ConfigError: if a value that `tuning.space` offers is not acceptable.
        """
        values = {TUNABLE[name]: value for name, value in parameters.items()}
        return self.settings.replaced({**values, "logging.wandb_run_name": f"{self.name}-{trial_name(number)}"})


def trial_name(number: int) -> str:
    """`trial-00017`, in the names of tracked runs."""
    return f"trial-{number:05d}"


def plan_study(merged_dir: Path, difficulty: Path, settings: Settings) -> Plan:
    """Work out what study the settings and inputs ask for.

    Raises:
        ConfigError: if [tuning] asks for what cannot be.
        InputError: if an input is missing.
    """
    tuning = settings.tuning
    if not _METRIC.fullmatch(tuning.metric):
        raise ConfigError(f"tuning.metric is {tuning.metric!r}; it must be recall@k, as in recall@100")
    space = space_of(tuning.space)
    seed = settings.seed if tuning.seed is None else tuning.seed
    fixed = {
        "training.num_epochs": tuning.max_epochs,
        "training.save_every_n_epochs": tuning.max_epochs + 1,  # never: the best and the last are kept anyway
        "training.selection_metric": tuning.metric,
        f"training.{FIXED}": tuning.max_queries,
        "training.val_sample_fraction": tuning.val_sample_fraction,
        "training.val_sample_buildings": None,
        "training.resume_from_checkpoint": None,
    }
    searched = {*TUNABLE.values(), *_OWN}
    config = {name: value for name, value in training_config(settings).items() if name not in searched}
    config |= {**settings.pick(*_IDENTITY), "tuning.seed": seed}
    inputs = training_inputs(merged_dir, difficulty)
    identity = stage_key(STAGE, CODE_VERSION, {**config, "space": describe(space)}, inputs)
    return Plan(
        name=f"{tuning.study_name}-{identity[:8]}",
        trials=tuning.trials,
        metric=tuning.metric,
        space=space,
        seed=seed,
        settings=settings.replaced(fixed),
        config={**config, **settings.pick("tuning.study_name", "tuning.trials")},
        inputs=inputs,
    )


@contextlib.contextmanager
def open_study(plan: Plan, storage_file: Path) -> Iterator[Study]:
    """The study in the database that the file names; made if it is not there. Connections last as long as the block.

    Raises:
        InputError: if the database does not answer.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a trial that fails is told of here, in one line
    storage = PatientStorage(storage_file, plan.settings.tuning)
    storage.quota = plan.trials
    study = optuna.create_study(
        storage=storage,
        study_name=plan.name,
        direction="maximize",
        load_if_exists=True,
        sampler=SeededByTrial(plan.seed, plan.settings.tuning.startup_trials),
        pruner=_pruner(plan.settings),
    )
    study.set_user_attr("metric", plan.metric)
    study.set_user_attr(FIXED, plan.settings.tuning.max_queries)
    study.set_user_attr("inputs", dict(plan.inputs))
    try:
        yield study
    finally:
        storage.close()


def _pruner(settings: Settings) -> BasePruner:
    tuning = settings.tuning
    if tuning.pruner == "median":
        return MedianPruner(tuning.pruner_startup_trials, tuning.pruner_warmup_epochs)
    if tuning.pruner == "hyperband":
        return HyperbandPruner(min_resource=max(1, tuning.pruner_warmup_epochs), max_resource=tuning.max_epochs)
    return NopPruner()


class SeededByTrial(BaseSampler):
    """TPE whose random numbers depend on the seed and on the trial's number, on nothing else.

    A sampler that is seeded once draws the same trials again after every restart of its worker, and workers of one seed
    all draw the same. Parallel workers see each other's running trials as bad ones (constant liar) and so keep apart.

    Args:
        seed: of the search.
        startup_trials: trials drawn at random before TPE begins.
    """

    def __init__(self, seed: int, startup_trials: int) -> None:
        self._seed = seed
        self._startup_trials = startup_trials
        self._tpe = self._for_trial(0)

    def _for_trial(self, number: int) -> TPESampler:
        digest = hashlib.sha256(f"{self._seed} {number}".encode()).digest()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return TPESampler(
                n_startup_trials=self._startup_trials,
                multivariate=True,
                constant_liar=True,
                seed=int.from_bytes(digest[:4], "big"),
            )

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._tpe = self._for_trial(trial.number)
        self._tpe.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._tpe.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._tpe.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._tpe.after_trial(study, trial, state, values)
