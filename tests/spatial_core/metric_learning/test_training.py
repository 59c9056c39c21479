"""The stage end to end on small planted data: it learns, repeats, selects, reports, and refuses what it must."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spatial_core.errors import ArtifactBusy, ArtifactError, ConfigError, InputError, ModelError
from spatial_core.metric_learning.checkpoint import BEST, FINAL, load_checkpoint
from spatial_core.metric_learning.training import train_projector
from spatial_core.report import Report
from spatial_core.retrieval.metrics import retrieval_metrics, select_queries
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.parquet import read_columns, vectors_to_numpy
from spatial_core.storage.provenance import verify_artifact
from tests.data.make_training_lake import MODEL, Lake, split_table, train_settings, write_split

MakeLake = Callable[..., Lake]


def train(lake: Lake, *overrides: str, output: Path | None = None, **options: Any) -> Report:
    return train_projector(lake.merged, lake.difficulty, output or lake.output, train_settings(*overrides), **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Every published file by name; locks and manifests, which hold times, left out."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."}


def test_training_beats_the_raw_features_on_buildings_it_never_saw(make_lake: MakeLake) -> None:
    lake = make_lake(train=120, val=40, dim=32)
    report = train(lake, "training.num_epochs=20")
    table = read_columns(lake.merged / "val.parquet", ["building_id", "embedding"])
    raw = torch.nn.functional.normalize(torch.from_numpy(vectors_to_numpy(table["embedding"]).copy()), dim=1)
    labels = torch.from_numpy(np.unique(table["building_id"].to_numpy(), return_inverse=True)[1])
    queries = select_queries(labels, 4096, 4, 42)
    before = retrieval_metrics(raw, labels, queries, (1,)).recall[1]
    assert before < 0.4
    assert report.details["metrics"]["recall@1"] > 0.75
    checkpoint = load_checkpoint(report.artifact)
    assert checkpoint.metrics == report.details["metrics"]
    history = checkpoint.history
    assert [entry["epoch"] for entry in history] == list(range(1, 21))
    assert history[-1]["train_loss"] < 0.3 * history[0]["train_loss"]
    best = max(history, key=lambda entry: (entry["validation"]["recall@1"], -entry["validation"]["loss"]))
    assert checkpoint.epoch == report.details["best_epoch"] == best["epoch"]
    for entry in history:
        assert sum(entry["band_shares"].values()) == pytest.approx(1)
        assert 0 <= entry["active_fraction"] <= 1
        assert all(0 <= reward <= 1 for reward in entry["band_rewards"].values())


def test_two_runs_give_identical_files_and_another_seed_does_not(lake: Lake, tmp_path: Path) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    train(lake)
    assert torch.equal(state, torch.get_rng_state()), "the caller's random state is left alone"
    torch.rand(5)
    train(lake, output=tmp_path / "again")
    assert contents(lake.output) == contents(tmp_path / "again")
    assert set(contents(lake.output)) == {
        *(f"checkpoint_{name}.{kind}" for name in ("best", "final") for kind in ("safetensors", "json")),
        "training_state.safetensors",
    }
    train(lake, "training.seed=7", output=tmp_path / "other")
    assert contents(lake.output)[BEST] != contents(tmp_path / "other")[BEST]


def test_a_finished_run_is_not_repeated_and_a_damaged_one_is_restored(lake: Lake) -> None:
    first = train(lake)
    before = contents(lake.output)
    verify_artifact(first.artifact)
    calls: list[int] = []
    again = train(lake, progress=lambda done, total, message: calls.append(done))
    assert again.up_to_date
    assert (again.artifact, again.rows, again.details) == (first.artifact, first.rows, first.details)
    (lake.output / BEST).write_bytes(b"damaged")
    restored = train(lake, progress=lambda done, total, message: calls.append(done))
    assert not calls, "the state holds everything, no epoch is trained again"
    assert not restored.up_to_date
    assert contents(lake.output) == before
    (lake.output / "checkpoint_best.json").unlink()
    train(lake)
    assert contents(lake.output) == before


def test_checkpoints_tell_where_they_come_from(lake: Lake) -> None:
    report = train(lake, "training.save_every_n_epochs=2")
    assert sorted(contents(lake.output)) == sorted(
        [f"checkpoint_{name}.{kind}" for name in ("best", "epoch_2", "final") for kind in ("json", "safetensors")]
        + ["training_state.safetensors"]
    )
    for name, epoch in ((FINAL, 3), ("checkpoint_epoch_2.safetensors", 2)):
        checkpoint = load_checkpoint(lake.output / name)
        assert checkpoint.epoch == epoch
        assert checkpoint.metrics == checkpoint.history[epoch - 1]["validation"]
        assert dict(checkpoint.backbone.model) == MODEL
        assert checkpoint.backbone.preprocessing == "test-224"
        assert checkpoint.provenance is not None
        assert checkpoint.provenance.stage == "train"
        assert checkpoint.provenance.config["training.margin"] == 0.5
        assert checkpoint.provenance.config["training_model.hidden_dim"] == 24
        assert set(checkpoint.provenance.inputs) == {"train", "val", "difficulty_metadata"}
        assert checkpoint.config_digest == train_settings("training.save_every_n_epochs=2").digest
    assert str(lake.output.parent) not in (lake.output / "checkpoint_best.json").read_text()
    assert report.details["parameters"] == load_checkpoint(lake.output).projector.parameter_count
    json.dumps(report.to_json(), allow_nan=False)


def test_rows_are_accounted_for(lake: Lake) -> None:
    table = read_columns(lake.merged / "train.parquet", ["building_id"])
    report = train(lake, "training.sample_buildings=10", "training.val_sample_fraction=0.5")
    assert report.rows_in == len(table)
    assert report.details["buildings"] == 10
    assert report.details["buildings_in_file"] == 24
    assert report.rejected["not_sampled"] == len(table) - report.kept
    difficulty = report.details["difficulty"]
    assert difficulty["images"] == report.kept
    assert difficulty["neighbours"] == sum(difficulty[name] for name in ("elsewhere", "own", "near", "kept"))


def test_early_stopping_and_selection_by_loss(lake: Lake) -> None:
    options = ("training.selection_metric=loss", "training.num_epochs=60", "training.learning_rate=0.05")
    report = train(lake, *options, "training.early_stopping_patience=2")
    details = report.details
    assert details["stopped_early"]
    assert details["epochs"] == details["best_epoch"] + 2
    losses = [entry["validation"]["loss"] for entry in load_checkpoint(report.artifact).history]
    assert losses[details["best_epoch"] - 1] == min(losses) == details["best_metric"]


def test_validating_seldom_still_validates_the_last_epoch(lake: Lake) -> None:
    report = train(lake, "training.validate_every_n_epochs=2")
    assert ["validation" in entry for entry in load_checkpoint(report.artifact).history] == [False, True, True]


@pytest.mark.parametrize("reward", ["negative_loss", "active_fraction"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_rewards_are_those_of_the_settings(lake: Lake, reward: str, distance: str) -> None:
    report = train(lake, f"training.ucb_reward={reward}", f"training.loss_distance={distance}")
    last = load_checkpoint(report.artifact).history[-1]
    for value in last["band_rewards"].values():
        assert value <= 0 if reward == "negative_loss" else 0 <= value <= 1


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_shorter_arithmetic_learns_the_same(lake: Lake, tmp_path: Path, precision: str) -> None:
    exact = train(lake, "training.num_epochs=5")
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    short = train(lake, "training.num_epochs=5", f"training.precision={precision}", output=tmp_path / "short")
    assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == before
    assert short.details["train_loss"] == pytest.approx(exact.details["train_loss"], rel=0.15)
    weights = load_checkpoint(short.artifact).projector.state_dict()
    assert all(weight.dtype == torch.float32 for weight in weights.values())


# Small and missing data


@pytest.mark.parametrize("val", [0, 1])
def test_without_a_usable_val_split_training_is_validated_on_train_and_says_so(make_lake: MakeLake, val: int) -> None:
    lake = make_lake(train=8, val=val)
    report = train(lake)
    assert report.details["validated_on"].startswith(f"train (val has {val} buildings")
    assert report.details["metrics"]["recall@5"] > 0
    (lake.merged / "val.parquet").unlink()
    assert train(lake).details["validated_on"] == "train (there is no val.parquet)"


def test_a_few_near_buildings_without_a_difficulty_table_of_their_own_train(
    make_lake: MakeLake, tmp_path: Path
) -> None:
    lake = make_lake(train=3, val=2)
    near = split_table(range(3), 1, 16, spacing=0.00001)
    write_split(lake.merged / "train.parquet", near)
    write_split(lake.merged / "val.parquet", split_table(range(50, 52), 2, 16))
    report = train(lake)
    assert report.details["random_negatives_too_near"] == 3 * report.kept
    assert report.details["band_shares"]["random"] == pytest.approx(1)
    assert load_checkpoint(report.artifact).history[-1]["band_rewards"] == dict.fromkeys("0123456")


@pytest.mark.parametrize(("buildings", "keep"), [(1, slice(None)), (6, slice(0, 1))])
def test_too_few_buildings_or_images_are_refused(lake: Lake, buildings: int, keep: slice) -> None:
    table = split_table(range(buildings), 1, 16)
    if keep.stop:
        table = table.take(np.unique(table["building_id"].to_numpy(), return_index=True)[1])
    write_split(lake.merged / "train.parquet", table)
    with pytest.raises(InputError, match=r"train\.parquet: . buildings.*training needs two buildings"):
        train(lake)
    assert not (lake.output / BEST).exists()


# Refusals


def test_settings_that_do_not_fit_are_refused(lake: Lake) -> None:
    with pytest.raises(ConfigError, match=r"input_dim is 99.*16 dimensions"):
        train(lake, "training_model.input_dim=99")
    with pytest.raises(ConfigError, match="selection_metric"):
        train(lake, "training.selection_metric=accuracy")
    with pytest.raises(ConfigError, match=r"infrastructure\.device is 'cud'; it must be"):
        train(lake, "infrastructure.device=cud")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="finds no CUDA device"):
            train(lake, "infrastructure.device=cuda")
    with pytest.raises(InputError, match="no such checkpoint"):
        train(lake, "training.resume_from_checkpoint=nowhere.pt")


def test_missing_inputs_are_named(lake: Lake) -> None:
    (lake.merged / "train.parquet").unlink()
    with pytest.raises(InputError, match=r"train\.parquet: no such file"):
        train(lake)
    lake.difficulty.unlink()
    with pytest.raises(InputError, match=r"difficulty\.parquet: no such file"):
        train(lake)


def test_splits_of_different_models_are_refused(lake: Lake) -> None:
    table = split_table(range(50, 60), 2, 16)
    write_split(lake.merged / "val.parquet", table, {**MODEL, "revision": "r2"})
    with pytest.raises(ArtifactError, match="features of different models"):
        train(lake)
    write_split(lake.merged / "val.parquet", split_table(range(50, 60), 2, 12))
    with pytest.raises(ArtifactError, match="features of different models"):
        train(lake)


def test_divergence_is_an_error_and_publishes_nothing(lake: Lake) -> None:
    with pytest.raises(ModelError, match=r"training diverged.*lower training\.learning_rate"):
        train(lake, "training.learning_rate=1e30", "training_model.use_layer_norm=false")
    assert contents(lake.output) == {}


def test_a_second_writer_is_turned_away(lake: Lake) -> None:
    with exclusive(lake.output / BEST), pytest.raises(ArtifactBusy):
        train(lake)


def test_progress_counts_triplets_to_the_end(lake: Lake) -> None:
    seen: list[tuple[int, int | None]] = []
    report = train(
        lake,
        "logging.log_every_n_batches=2",
        progress=lambda done, total, message: seen.append((done, total)),
    )
    assert seen[-1] == (3 * report.rows, 3 * report.rows)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_tracking_that_is_off_stays_off(lake: Lake, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report = train(lake)
    assert report.details["tracking"] is None
    assert not caplog.records


def test_an_observer_sees_every_validation_and_may_end_the_run(lake: Lake) -> None:
    seen: list[tuple[int, float]] = []

    def observer(epoch: int, metrics: Mapping[str, float]) -> bool:
        seen.append((epoch, metrics["recall@1"]))
        return epoch < 4

    report = train(lake, "training.num_epochs=9", "training.validate_every_n_epochs=2", observer=observer)
    history = load_checkpoint(lake.output / FINAL).history
    assert [epoch for epoch, _ in seen] == [2, 4]
    assert seen == [(entry["epoch"], entry["validation"]["recall@1"]) for entry in history if "validation" in entry]
    assert (report.details["epochs"], report.details["ended_by_observer"]) == (4, True)
    assert len(history) == 4
    assert report.details["best_metric"] == max(recall for _, recall in seen)
    assert 0 < report.details["validation_queries"] <= report.details["validation_images"]


def test_a_run_that_goes_on_shows_its_beginning_again(lake: Lake) -> None:
    seen: list[int] = []

    def killed(epoch: int, metrics: Mapping[str, float]) -> bool:
        if epoch == 3:
            raise KeyboardInterrupt
        return True

    def observer(epoch: int, metrics: Mapping[str, float]) -> bool:
        seen.append(epoch)
        return True

    with pytest.raises(KeyboardInterrupt):
        train(lake, "training.num_epochs=5", observer=killed)
    report = train(lake, "training.num_epochs=5", observer=observer)
    assert seen == [1, 2, 3, 4, 5]
    assert (report.details["resumed_from_epoch"], report.details["ended_by_observer"]) == (3, False)
