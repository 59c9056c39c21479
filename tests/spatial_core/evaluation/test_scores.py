"""Scores of all methods on one split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from spatial_core.evaluation.results import METRICS, SplitResult
from spatial_core.evaluation.scores import Intervals, run_queries, score_methods
from spatial_core.retrieval.bootstrap import Estimate
from spatial_core.retrieval.metrics import select_queries

INTERVALS = Intervals(samples=200, confidence=0.95, seed=0)
CPU = torch.device("cpu")


def planted(images: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) // 2
    centres = torch.randn(images, 16, generator=generator)[labels]
    noise = torch.randn(images, 16, generator=generator)
    spaces = {"projector": normalize(centres + 0.4 * noise), "backbone": normalize(centres + 1.2 * noise)}
    return spaces, labels, select_queries(labels, 10_000, 0, seed=0)


def test_values_intervals_gains_and_chance() -> None:
    spaces, labels, rows = planted(400)
    queries = run_queries(spaces, labels, rows, CPU)
    found = score_methods(queries, 400, INTERVALS)
    assert set(found.scores) == {"projector", "backbone", "chance"}
    for method in spaces:
        outcome = queries.outcomes[method]
        values = {
            **{f"recall@{k}": share for k, share in outcome.recall.items()},
            "mAP": outcome.mean_average_precision,
        }
        values["MRR"] = outcome.mean_reciprocal_rank
        for name in METRICS:
            estimate = found.scores[method][name]
            if name == "recall@1000":
                assert estimate is None
                continue
            assert estimate is not None and estimate.low is not None and estimate.high is not None
            assert estimate.value == pytest.approx(values[name])
            assert estimate.low <= estimate.value <= estimate.high
    gain = found.gains["recall@1"]
    ours, raw = found.scores["projector"]["recall@1"], found.scores["backbone"]["recall@1"]
    assert ours is not None and raw is not None and gain.low is not None
    assert gain.value == pytest.approx(ours.value - raw.value) and gain.low > 0
    assert found.scores["chance"]["recall@5"] == Estimate(pytest.approx(5 / 399))
    assert found.curve_k[-1] < 399
    assert found.curves["projector"][0] == pytest.approx(ours.value, abs=1e-6)
    assert found.curves["chance"][0] == pytest.approx(1 / 399, abs=1e-6)


@pytest.mark.parametrize(("images", "measured"), [(6, 1), (7, 2), (102, 4), (101, 3)])
def test_a_k_that_reaches_every_other_image_is_not_reported(images: int, measured: int) -> None:
    spaces, labels, rows = planted(images)
    labels[-1] = labels[-2]  # an odd number of images has a single one at the end
    found = score_methods(run_queries(spaces, labels, rows[labels[rows] != labels[-1]], CPU), images, INTERVALS)
    recalls = [name for name in METRICS if name.startswith("recall") and found.scores["projector"][name] is not None]
    assert len(recalls) == measured
    assert found.scores["projector"]["mAP"] is not None
    assert all((name in found.gains) == (name in recalls) for name in METRICS[:5])


def test_the_headline_is_flat_and_complete() -> None:
    spaces, labels, rows = planted(60)
    queries = run_queries(spaces, labels, rows, CPU)
    found = score_methods(queries, 60, INTERVALS)
    result = SplitResult("val", 60, 30, len(rows), 30, found.scores, found.gains, found.curves, found.curve_k)
    headline = result.headline()
    assert [(row["split"], row["method"]) for row in headline] == [
        ("val", "projector"),
        ("val", "backbone"),
        ("val", "chance"),
    ]
    for row in headline:
        assert set(row) == {
            "split",
            "method",
            "queries",
            "buildings",
            "images",
            *METRICS,
            *(f"{m}_ci" for m in METRICS),
        }
        assert row["recall@100"] is None and row["recall@100_ci"] is None
    assert headline[0]["recall@1_ci"][0] <= headline[0]["recall@1"] <= headline[0]["recall@1_ci"][1]
    assert headline[2]["recall@1_ci"] is None
    assert all(isinstance(row["recall@1"], float) and not isinstance(row["recall@1"], np.floating) for row in headline)
