"""Training with a study: the best trial's hyper-parameters, and what is refused or said when there are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError, ConfigError, DigestMismatch, InputError
from spatial_core.lake.sql import query_lake
from spatial_core.lake.status import lake_status
from spatial_core.metric_learning.best_trial import read_advice
from spatial_core.metric_learning.checkpoint import load_checkpoint
from spatial_core.metric_learning.training import train_projector
from spatial_core.quality.checks import study_sound
from spatial_core.report import Report
from spatial_core.storage.atomic import write_json
from tests.data.make_training_lake import Lake, train_settings
from tests.spatial_core.tuning.conftest import study_by_one

PARAMETERS = {
    "learning_rate": 0.02,
    "weight_decay": 1e-5,
    "margin": 0.37,
    "dropout": 0.05,
    "use_residual": False,
    "use_layer_norm": True,
    "loss_distance": "cosine",
    "hidden_dim": 20,
    "num_hidden_layers": 2,
    "hidden_dim_multiplier": 0.75,
    "activation": "relu",
    "batch_size": 12,
    "ucb_exploration_constant": 1.5,
    "ucb_warmup_samples": 100,
}


def study_file(path: Path, **changes: Any) -> Path:
    record = {
        "format": "spatial-study/1",
        "study": "projector-12345678",
        "metric": "recall@1",
        "best": {"number": 17, "value": 0.75, "parameters": PARAMETERS},
        "trials": [{"number": 17, "value": 0.75, "state": "complete"}],
        "provenance": {"inputs": {"merged_splits": "of others"}},
        **changes,
    }
    write_json(path, record)
    return path


def train(lake: Lake, output: Path, study: Path | None, *overrides: str) -> Report:
    return train_projector(lake.merged, lake.difficulty, output, train_settings(*overrides), study=study)


def test_the_best_trial_takes_the_place_of_the_settings(lake: Lake, tmp_path: Path) -> None:
    study = study_file(tmp_path / "study.json")
    output = tmp_path / "out"
    report = train(lake, output, study, "training.dropout=0.9", "training.num_epochs=2")
    checkpoint = load_checkpoint(report.artifact)
    assert checkpoint.provenance is not None
    config = checkpoint.provenance.config
    head = {"dropout", "use_residual", "use_layer_norm", "hidden_dim", "num_hidden_layers", "hidden_dim_multiplier"}
    for name, value in PARAMETERS.items():
        section = "training_model" if name in head | {"activation"} else "training"
        assert config[f"{section}.{name}"] == value, name
    assert checkpoint.config.hidden_widths == (20, 16)
    assert report.details["epochs"] == 2, "how long to train is not the study's to say"
    assert config["training.num_epochs"] == 2
    assert checkpoint.provenance.inputs["tuning_study"] == read_advice(study).sha256
    told = report.details["study"]
    assert (told["study"], told["trial"], told["metric"], told["value"]) == ("projector-12345678", 17, "recall@1", 0.75)
    assert told["settings"]["training.margin"] == 0.37
    assert told["same_inputs"] is False
    assert train(lake, output, study, "training.dropout=0.9", "training.num_epochs=2").up_to_date


def test_another_study_is_another_run_and_so_is_none(lake: Lake, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(lake, output, study_file(tmp_path / "study.json"))
    other = study_file(tmp_path / "other.json", study="projector-87654321")
    assert not train(lake, output, other).up_to_date
    without = train(lake, output, None)
    assert not without.up_to_date
    assert "study" not in without.details
    assert without.details["projector"]["hidden_widths"] == [24]


def test_without_a_completed_trial_the_settings_stay_and_it_says_so(lake: Lake, tmp_path: Path) -> None:
    study = study_file(tmp_path / "study.json", best=None)
    report = train(lake, tmp_path / "out", study)
    assert report.details["projector"]["hidden_widths"] == [24]
    assert report.details["study"]["trial"] is None
    assert "no trial was completed" in report.details["study"]["note"]


@pytest.mark.parametrize(
    ("best", "error", "message"),
    [
        ({"learning_rate": -1}, ConfigError, r"trial 17: training\.learning_rate"),
        ({"activation": "exp"}, ConfigError, r"training_model\.activation"),
        ({"resume_from_checkpoint": "/etc/passwd"}, ConfigError, "cannot be taken over"),
        ({"num_epochs": 1}, ConfigError, "cannot be taken over"),
    ],
)
def test_hyper_parameters_are_checked_as_settings_are(
    lake: Lake, tmp_path: Path, best: dict[str, Any], error: type[Exception], message: str
) -> None:
    study = study_file(tmp_path / "study.json", best={"number": 17, "value": 0.5, "parameters": best})
    with pytest.raises(error, match=message):
        train(lake, tmp_path / "out", study)
    assert not (tmp_path / "out" / "checkpoint_best.safetensors").exists()


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda path: path.unlink(), InputError),
        (lambda path: path.write_text("{"), ArtifactError),
        (lambda path: path.write_text("[]"), ArtifactError),
        (lambda path: path.write_text('{"format": "spatial-study/9"}'), ArtifactError),
    ],
)
def test_what_is_no_study_is_refused(
    lake: Lake, tmp_path: Path, spoil: Callable[[Path], object], error: type[Exception]
) -> None:
    study = study_file(tmp_path / "study.json")
    spoil(study)
    with pytest.raises(error, match=r"study\.json"):
        train(lake, tmp_path / "out", study)


@pytest.fixture
def searched(lake: Lake, database: Path, tuned: Callable[..., Settings], tmp_path: Path) -> tuple[Settings, Report]:
    """A real study in the lake of its settings."""
    settings = tuned(f"paths.merged_dir={lake.merged}", f"paths.difficulty_metadata_path={lake.difficulty}")
    return settings, study_by_one(lake, settings.locations.tuning_dir, settings, database)


def test_a_real_study_trains_the_head_of_its_best_trial(lake: Lake, searched: tuple[Settings, Report]) -> None:
    settings, study = searched
    at = settings.locations
    report = train_projector(lake.merged, lake.difficulty, at.checkpoint_dir, settings, study=study.artifact)
    best = study.details["best"]
    assert report.details["study"]["trial"] == best["number"]
    assert report.details["study"]["same_inputs"] is True
    assert report.details["projector"]["hidden_widths"][0] == best["parameters"]["hidden_dim"]

    def states(chosen: Settings) -> dict[str, tuple[str, str]]:
        wanted = {"tuning_study", "projector_checkpoint"}
        return {found.asset: (found.state, found.why) for found in lake_status(chosen) if found.asset in wanted}

    made = {"tuning_study": ("made", ""), "projector_checkpoint": ("made", "")}
    assert states(settings) == made, "what the study decided is not a change of settings"
    assert states(settings.replaced({"training.margin": 0.9})) == made
    stale = states(settings.replaced({"training.num_epochs": 9}))
    assert stale["projector_checkpoint"] == ("stale", "settings changed: training.num_epochs")
    assert stale["tuning_study"] == ("made", "")
    longer = states(settings.replaced({"tuning.max_epochs": 9}))
    assert longer["tuning_study"] == ("stale", "settings changed: tuning.max_epochs")
    assert longer["projector_checkpoint"] == ("stale", "tuning_study is stale")


def test_a_new_study_makes_the_checkpoint_stale_and_none_does_not(
    lake: Lake, tuned: Callable[..., Settings], database: Path
) -> None:
    settings = tuned(f"paths.merged_dir={lake.merged}", f"paths.difficulty_metadata_path={lake.difficulty}")
    at = settings.locations
    train_projector(lake.merged, lake.difficulty, at.checkpoint_dir, settings)
    found = {status.asset: status for status in lake_status(settings)}
    assert found["projector_checkpoint"].state == "made"
    assert (found["tuning_study"].state, found["tuning_study"].why) == ("on demand", "")
    study_by_one(lake, at.tuning_dir, settings, database)
    found = {status.asset: status for status in lake_status(settings)}
    assert found["projector_checkpoint"].why == "tuning_study changed or is new"


def test_trials_are_open_to_sql(searched: tuple[Settings, Report]) -> None:
    settings, study = searched
    query = (
        "select number, state, value, parameters.hidden_dim, parameters.activation, study from tuning_trials "
        "where state = 'complete' order by value desc, number limit 1"
    )
    number, state, value, hidden, activation, name = query_lake(settings, query).fetchall()[0]
    best = study.details["best"]
    assert (number, state, value, name) == (best["number"], "complete", best["value"], study.details["study"])
    shown = query_lake(settings, "select * from tuning_trials").columns
    assert shown == ["study", *schemas.TRIALS.names]
    assert set(json.loads(study.artifact.read_text())["trials"][0]) == set(schemas.TRIALS.names)
    assert (hidden, activation) == (best["parameters"]["hidden_dim"], best["parameters"]["activation"])


def test_the_check_of_a_study(searched: tuple[Settings, Report]) -> None:
    _, study = searched
    assert study_sound(study.artifact).passed
    record = json.loads(study.artifact.read_text())
    study.artifact.write_text(json.dumps({**record, "best": None}))
    damaged = study_sound(study.artifact)
    assert (damaged.passed, damaged.severity) == (False, "error")
    with pytest.raises(DigestMismatch):
        read_advice(study.artifact)
