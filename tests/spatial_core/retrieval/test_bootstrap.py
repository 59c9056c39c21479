"""Intervals: right on average, wider for clusters than for independent rows, reproducible."""

from __future__ import annotations

import numpy as np
import pytest

from spatial_core.retrieval import bootstrap
from spatial_core.retrieval.bootstrap import Estimate, cluster_bootstrap


def by_loop(values: np.ndarray, clusters: np.ndarray, samples: int, confidence: float, seed: int) -> list[Estimate]:
    generator = np.random.default_rng(seed)
    names = sorted(set(clusters.tolist()))
    picks = generator.integers(0, len(names), (samples, len(names)))
    drawn = [np.concatenate([values[clusters == names[pick]] for pick in row]).mean(axis=0) for row in picks]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return [Estimate(*triple) for triple in zip(values.mean(axis=0), low, high, strict=True)]


@pytest.mark.parametrize("block", [1, 100, 4_000_000])
def test_agrees_with_a_loop_over_resamples_in_any_block_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_BLOCK_WEIGHTS", block)
    generator = np.random.default_rng(0)
    clusters = generator.integers(0, 9, 40) * 7 - 3
    values = generator.random((40, 3))
    found = cluster_bootstrap(values, clusters, samples=50, confidence=0.9, seed=4)
    for ours, loop in zip(found, by_loop(values, clusters, 50, 0.9, 4), strict=True):
        assert ours.value == pytest.approx(loop.value)
        assert (ours.low, ours.high) == pytest.approx((loop.low, loop.high))


def test_ninety_five_percent_intervals_cover_the_truth_about_that_often() -> None:
    generator = np.random.default_rng(1)
    clusters = np.repeat(np.arange(60), 4)
    covered = naive = 0
    for trial in range(300):
        building = generator.random(60)[:, None] < 0.7
        values = np.repeat(building.astype(float), 4, axis=0)  # all queries of a building agree
        (found,) = cluster_bootstrap(values, clusters, samples=300, confidence=0.95, seed=trial)
        (alone,) = cluster_bootstrap(values, np.arange(240), samples=300, confidence=0.95, seed=trial)
        assert found.low is not None and found.high is not None and alone.low is not None and alone.high is not None
        covered += found.low <= 0.7 <= found.high
        naive += alone.low <= 0.7 <= alone.high
    assert 0.90 <= covered / 300 <= 0.985
    assert naive / 300 < 0.8


def test_a_paired_difference_is_narrower_than_its_parts() -> None:
    generator = np.random.default_rng(2)
    base = generator.random(200)
    values = np.stack([base, base + 0.1, np.full(200, 0.1)], axis=1)
    first, _, gain = cluster_bootstrap(values, np.arange(200), samples=200, confidence=0.95, seed=0)
    assert gain.low == pytest.approx(0.1) and gain.high == pytest.approx(0.1)
    assert first.high is not None and first.low is not None and first.high - first.low > 0.05


def test_one_building_has_no_interval() -> None:
    (only,) = cluster_bootstrap(np.array([[0.0], [1.0]]), np.array([5, 5]), samples=10, confidence=0.95, seed=0)
    assert only == Estimate(0.5, None, None)
    assert only.to_json() == {"value": 0.5, "low": None, "high": None}


def test_the_seed_decides() -> None:
    values = np.random.default_rng(3).random((50, 1))
    results = [cluster_bootstrap(values, np.arange(50), samples=99, confidence=0.8, seed=seed) for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]
