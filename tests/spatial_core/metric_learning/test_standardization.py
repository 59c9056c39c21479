"""Standardised training must be invisible in the checkpoint: the saved head applies to raw features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spatial_core.metric_learning import standardization
from spatial_core.metric_learning.checkpoint import load_checkpoint
from spatial_core.metric_learning.features import load_split
from spatial_core.metric_learning.projector import Projector, ProjectorConfig, build_projector, project
from spatial_core.metric_learning.standardization import Frame
from spatial_core.metric_learning.training import train_projector
from spatial_core.report import Report
from spatial_core.retrieval.metrics import retrieval_metrics, select_queries
from tests.data.make_training_lake import Lake, split_table, train_settings, write_difficulty, write_split


def shifted(rows: int = 200, dim: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator) * 0.1 + torch.randn(dim, generator=generator) * 3


@pytest.mark.parametrize("block_bytes", [1, 8 * 12 * 7, 1 << 20])
def test_mean_and_scale_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(standardization, "_BLOCK_BYTES", block_bytes)
    values = shifted()
    exact = values.double().numpy()
    frame = Frame.of(values)
    assert np.allclose(frame.mean.numpy(), exact.mean(0), atol=1e-12)
    assert frame.scale == pytest.approx(np.sqrt(exact.var(0).mean()), rel=1e-12)
    frame.apply_(values)
    assert np.allclose(values.numpy(), (exact - exact.mean(0)) / frame.scale, atol=1e-6)
    assert float(values.square().mean()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("residual", [True, False])
def test_an_absorbed_head_on_raw_features_is_the_head_on_standardised_ones(residual: bool) -> None:
    config = ProjectorConfig(12, (9, 8), 5, use_residual=residual)
    torch.manual_seed(4)
    head = Projector(config).eval()
    raw = shifted()
    frame, values = Frame.of(raw), raw.clone()
    frame.apply_(values)
    absorbed = frame.absorb(head.state_dict())
    assert torch.allclose(build_projector(config, absorbed)(raw), head(values), atol=1e-4)
    for name, weight in frame.release(absorbed).items():
        assert torch.allclose(weight, head.state_dict()[name], atol=1e-4)
    untouched = Frame.raw(12)
    assert untouched.is_raw
    assert all(torch.equal(w, head.state_dict()[n]) for n, w in untouched.absorb(head.state_dict()).items())


def test_features_that_are_all_alike_are_centred_and_not_divided_by_nothing() -> None:
    values = torch.full((6, 4), 2.5)
    frame = Frame.of(values)
    frame.apply_(values)
    assert frame.scale == 1.0
    assert not values.any()


def test_half_precision_and_mapped_features_are_standardised_in_place(tmp_path: Path) -> None:
    table = split_table(range(15), 1, 12, "float16")
    path = tmp_path / "train.parquet"
    write_split(path, table)
    split = load_split(path, torch.device("cpu"), tmp_path, host_budget=0)
    before = split.values.double().numpy()
    Frame.of(split.values).apply_(split.values)
    assert (split.placed, split.values.dtype) == ("disk", torch.float16)
    expected = (before - before.mean(0)) / np.sqrt(before.var(0).mean())
    assert np.allclose(split.values.double().numpy(), expected, atol=4e-3)


def with_common_part(lake: Lake, strength: float) -> None:
    """Splits whose features share a large common vector, as those of a backbone do."""
    tables = []
    for name, buildings, seed in (("train", range(60), 1), ("val", range(1000, 1030), 2)):
        table = split_table(buildings, seed, 16)
        features = np.stack(table["embedding"].to_numpy()) + np.float32(strength) * np.linspace(-1, 2, 16, dtype="f4")
        column = table.schema.get_field_index("embedding")
        fixed = table["embedding"].chunk(0).from_arrays(features.reshape(-1), 16)
        table = table.set_column(column, table.schema.field(column).name, fixed)
        write_split(lake.merged / f"{name}.parquet", table)
        tables.append(table)
    write_difficulty(lake.difficulty, tables, 3)


def train(lake: Lake, *overrides: str, output: Path | None = None) -> Report:
    return train_projector(lake.merged, lake.difficulty, output or lake.output, train_settings(*overrides))


def test_the_saved_head_scores_on_raw_features_what_validation_measured(lake: Lake) -> None:
    with_common_part(lake, 20.0)
    report = train(lake)
    assert report.details["standardized"]
    checkpoint = load_checkpoint(report.artifact)
    split = load_split(lake.merged / "val.parquet", torch.device("cpu"), lake.output)
    label = torch.from_numpy(split.label)
    vectors = project(checkpoint.projector, split.values)
    found = retrieval_metrics(vectors, label, select_queries(label, 4096, 4, 42), (1, 5))
    assert found.recall[1] == pytest.approx(checkpoint.metrics["recall@1"], abs=0.02)
    assert found.mean_average_precision == pytest.approx(checkpoint.metrics["map"], abs=0.01)


def test_a_common_part_no_longer_slows_training(lake: Lake, tmp_path: Path) -> None:
    losses = {}
    for strength in (0.0, 100.0):
        with_common_part(lake, strength)
        for flag in ("true", "false"):
            options = ("training_model.dropout=0", f"training.standardize_features={flag}")
            report = train(lake, *options, output=tmp_path / f"{flag}{strength}")
            assert report.details["standardized"] == (flag == "true")
            losses[flag, strength] = report.details["train_loss"]
    assert losses["true", 100.0] == pytest.approx(losses["true", 0.0], rel=0.01)
    assert losses["false", 100.0] > 1.2 * losses["false", 0.0]


def test_starting_from_a_checkpoint_in_another_frame_keeps_what_it_computes(lake: Lake, tmp_path: Path) -> None:
    with_common_part(lake, 5.0)
    first = train(lake, "training.standardize_features=false")
    still = ("training.num_epochs=4", "training.learning_rate=1e-9", "training.weight_decay=0")
    start = f"training.resume_from_checkpoint={lake.output / 'checkpoint_final.safetensors'}"
    train(lake, start, *still, output=tmp_path / "on")
    features = load_split(lake.merged / "val.parquet", torch.device("cpu"), tmp_path).values
    before, after = (
        project(load_checkpoint(folder / "checkpoint_final.safetensors").projector, features)
        for folder in (first.artifact.parent, tmp_path / "on")
    )
    assert torch.allclose(before, after, atol=1e-4)
