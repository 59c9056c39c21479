"""Validation is the same measurement at every epoch, and measures what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spatial_core.errors import ConfigError
from spatial_core.metric_learning.features import Split, load_split
from spatial_core.metric_learning.projector import Projector, ProjectorConfig
from spatial_core.metric_learning.validation import Selection, Validator
from tests.data.make_training_lake import Lake, train_settings

CONFIG = ProjectorConfig(16, (12,), 6, dropout=0.4)


def validator(lake: Lake, seed: int = 1, *overrides: str) -> tuple[Validator, Split]:
    settings = train_settings(*overrides).training
    split = load_split(lake.merged / "val.parquet", torch.device("cpu"), lake.output)
    return Validator(split, lake.difficulty, settings, min_distance_m=30.0, seed=seed), split


def test_metrics_equal_a_plain_loop_over_queries_and_triplets(lake: Lake) -> None:
    torch.manual_seed(0)
    projector = Projector(CONFIG).train()
    made, split = validator(lake)
    measured = made.measure(projector)
    assert projector.training
    with torch.no_grad():
        vectors = projector.eval()(split.values.float())
    label = split.label.tolist()
    queries = made.queries.tolist()
    assert len(queries) == sum(min(4, label.count(own)) for own in set(label))
    hits = {1: 0, 5: 0}
    for query in queries:
        order = (vectors @ vectors[query]).argsort(descending=True).tolist()
        order.remove(query)
        for k in hits:
            hits[k] += any(label[row] == label[query] for row in order[:k])
    for k, count in hits.items():
        assert measured[f"recall@{k}"] == pytest.approx(count / len(queries))
    anchors, positives, negatives = made.triplets.chunk(3)
    losses = []
    for anchor, positive, negative in zip(anchors.tolist(), positives.tolist(), negatives.tolist(), strict=True):
        assert label[anchor] == label[positive] != label[negative]
        assert anchor != positive
        near, far = (float((vectors[anchor] - vectors[row] + 1e-6).norm()) for row in (positive, negative))
        losses.append(max(0.0, 0.5 + near - far))
    assert measured["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert len(losses) == len(label), "every image of this small split is an anchor"


def test_the_choice_is_fixed_by_the_seed(lake: Lake) -> None:
    one, two, other = (validator(lake, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one.triplets, two.triplets)
    assert torch.equal(one.queries, two.queries)
    assert not torch.equal(one.triplets, other.triplets)
    projector = Projector(CONFIG)
    assert one.measure(projector) == one.measure(projector) == two.measure(projector)


def test_the_k_that_selects_is_always_measured(lake: Lake) -> None:
    made, _ = validator(lake, 1, "training.selection_metric=recall@3")
    assert {"recall@1", "recall@3", "recall@5"} <= set(made.measure(Projector(CONFIG)))


def test_selection_orders_by_recall_then_loss_or_by_loss() -> None:
    recall, loss = Selection("recall@5"), Selection("loss")
    good, better, tied = {"recall@5": 0.5, "loss": 0.1}, {"recall@5": 0.6, "loss": 0.9}, {"recall@5": 0.5, "loss": 0.05}
    assert recall.key(better) > recall.key(tied) > recall.key(good)
    assert loss.key(tied) > loss.key(good) > loss.key(better)


@pytest.mark.parametrize("metric", ["accuracy", "recall", "recall@", "recall@x", "recall@0", "loss@1", "precision@1"])
def test_other_metrics_are_refused(metric: str) -> None:
    with pytest.raises(ConfigError, match="must be loss or recall@k"):
        Selection(metric)
