"""The compared spaces: what each holds, and that none is made from what it should not see."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.decomposition import PCA
from torch.nn.functional import normalize

from spatial_core.errors import ModelError
from spatial_core.evaluation import spaces as module
from spatial_core.evaluation.spaces import build_spaces, fit_pca
from spatial_core.evaluation.split_data import read_split
from spatial_core.metric_learning.checkpoint import load_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("dimensions", [5, 256])
def test_components_are_those_of_scikit_learn(make_lake: Callable[..., object], dimensions: int) -> None:
    path = make_lake({"train": 50}, pictures=False).merged / "train.parquet"
    features = np.array(pq.read_table(path).column("embedding").to_pylist())
    ours, theirs = fit_pca(path, dimensions), PCA(min(dimensions, 48)).fit(features)
    assert ours.components.shape == (48, min(dimensions, 48))
    assert ours.rows == len(features)
    np.testing.assert_allclose(ours.mean, theirs.mean_, atol=1e-5)
    assert ours.explained == pytest.approx(theirs.explained_variance_ratio_.sum(), abs=1e-5)
    angle = np.abs((ours.components.T.numpy() * theirs.components_).sum(1))
    np.testing.assert_allclose(angle[:5], 1, atol=1e-3)


def test_of_many_training_images_an_even_choice_is_used(
    make_lake: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_lake({"train": 60}, pictures=False).merged / "train.parquet"
    features = np.array(pq.read_table(path).column("embedding").to_pylist())
    monkeypatch.setattr(module, "_PCA_ROWS", 50)
    stride = -(-len(features) // 50)
    monkeypatch.setattr("spatial_core.evaluation.split_data._BATCH_BYTES", 8 * 48 * 7)
    model = fit_pca(path, 8)
    assert model.rows == len(features[::stride]) <= 50
    np.testing.assert_allclose(model.mean, features[::stride].mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_space_has_unit_rows_and_its_own_content(
    make_lake: Callable[..., object], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * 48 * 7)
    lake = make_lake({"train": 30, "test": 20}, dtype=dtype, pictures=False)
    split = read_split(lake.merged / "test.parquet", "test")
    features = split.features.float().clone()
    head, pca = load_checkpoint(lake.checkpoint).projector, fit_pca(lake.merged / "train.parquet", 6)
    found = build_spaces(split, head, pca, CPU, seed=3)
    assert list(found) == ["projector", "backbone", "pca", "random"]
    for vectors in found.values():
        assert torch.allclose(vectors.float().norm(dim=1), torch.ones(len(split)), atol=1e-3)
    assert torch.allclose(found["projector"][:, :12], normalize(features[:, :12]), atol=1e-5)
    assert torch.allclose(found["backbone"].float(), normalize(features), atol=1e-3)
    assert found["backbone"] is split.features
    assert torch.allclose(found["pca"], normalize((features - pca.mean) @ pca.components), atol=1e-5)
    again = build_spaces(read_split(lake.merged / "test.parquet", "test"), head, None, CPU, seed=3)
    assert torch.equal(again["random"], found["random"]) and "pca" not in again


def test_a_head_or_components_of_other_features_are_refused(make_lake: Callable[..., object]) -> None:
    lake = make_lake({"train": 10, "test": 10}, pictures=False)
    head, pca = load_checkpoint(lake.checkpoint).projector, fit_pca(lake.merged / "train.parquet", 6)
    split = read_split(lake.merged / "test.parquet", "test")
    narrow = type(split)(**{**vars(split), "features": split.features[:, :40]})
    with pytest.raises(ModelError, match=r"test split: features have 40 dimensions, the projector takes 48"):
        build_spaces(narrow, head, None, CPU, seed=0)
    fewer = type(pca)(pca.mean[:40], pca.components[:40], pca.rows, pca.explained)
    with pytest.raises(ModelError, match=r"48 dimensions, those of train have 40"):
        build_spaces(split, head, fewer, CPU, seed=0)


def test_components_need_training_images(make_lake: Callable[..., object]) -> None:
    with pytest.raises(ModelError, match="no training images"):
        fit_pca(make_lake({"train": 0}, pictures=False).merged / "train.parquet", 4)
