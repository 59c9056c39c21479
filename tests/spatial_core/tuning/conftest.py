"""A tiny lake to tune on, and one real PostgreSQL for all tests of a module."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from spatial_core.config.settings import Settings
from spatial_core.config.tuning import TuningSection
from spatial_core.report import Report
from spatial_core.tuning.collect import collect_study
from spatial_core.tuning.postgres import embedded_database
from spatial_core.tuning.worker import tune_worker
from tests.data.make_training_lake import Lake, build_lake, train_settings

SPACE = (
    "{hidden_dim=[16, 24], batch_size=[8, 16], num_hidden_layers=[1, 2], ucb_warmup_samples=[50], "
    "learning_rate=[1e-4, 1e-1]}"
)
MakeSettings = Callable[..., Settings]


def keeper_of(folder: Path) -> psutil.Process:
    """The keeper, started by this process, of the PostgreSQL in a folder."""
    (keeper,) = [child for child in psutil.Process().children() if str(folder / "postgres") in child.cmdline()]
    return keeper


def study_by_one(lake: Lake, output: Path, settings: Settings, database: Path) -> Report:
    """A study made by one worker in this process, which spares the seconds that starting others takes."""
    tune_worker(lake.merged, lake.difficulty, output, database, "00", settings)
    return collect_study(lake.merged, lake.difficulty, output, database, settings)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """File with the URL of a running PostgreSQL; tests keep apart by the names of their studies."""
    with embedded_database(tmp_path_factory.mktemp("database"), TuningSection()) as url:
        yield url


@pytest.fixture(scope="session")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Splits and difficulty table that no test changes."""
    return build_lake(tmp_path_factory.mktemp("lake"))


@pytest.fixture
def tuned(tmp_path: Path, request: pytest.FixtureRequest) -> MakeSettings:
    """Settings of a short study that no other test has."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name)[-64:].strip("-")

    def make(*overrides: str) -> Settings:
        return train_settings(
            f"paths.data_dir={tmp_path}",
            f"tuning.study_name={name}",
            "tuning.trials=3",
            "tuning.max_epochs=3",
            "tuning.workers=1",
            "tuning.metric=recall@1",
            "tuning.startup_trials=2",
            "tuning.pruner=none",
            "tuning.heartbeat_s=1",
            "tuning.grace_s=3",
            f"tuning.space={SPACE}",
            *overrides,
        )

    return make
