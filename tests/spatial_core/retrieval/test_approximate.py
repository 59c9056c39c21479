"""Approximate search: the recall it reports is the recall it has, and it is the same in every run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from spatial_core.retrieval.approximate import ApproximateSearch
from spatial_core.retrieval.pairs import NO_ROW, Metric
from spatial_core.retrieval.search import search


def clustered(count: int, dim: int, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((200, dim))
    return (centres[rng.integers(0, 200, count)] + 0.5 * rng.standard_normal((count, dim))).astype(np.float32)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_the_reported_recall_is_that_of_all_queries(metric: Metric) -> None:
    vectors = clustered(6000, 16)
    index = ApproximateSearch(vectors, 50, metric=metric, seed=1, threads=2)
    distances, rows = index.search(vectors, 50)
    exact_distances, exact_rows = search(vectors, vectors, 50, metric=metric)
    recall = np.mean([len(np.intersect1d(a, b)) / 50 for a, b in zip(rows, exact_rows, strict=True)])
    assert index.recall >= 0.98
    assert index.recall == pytest.approx(recall, abs=0.005)
    assert index.sample == 1000
    assert index.probes < index.groups
    # What is found has exactly the score the exact search gives it.
    scores = dict(zip(exact_rows[7].tolist(), exact_distances[7].tolist(), strict=True))
    common = [(row, score) for row, score in zip(rows[7].tolist(), distances[7].tolist(), strict=True) if row in scores]
    assert len(common) > 40
    assert all(scores[row] == score for row, score in common)


def test_a_higher_target_looks_into_more_groups() -> None:
    vectors = clustered(6000, 16)
    loose = ApproximateSearch(vectors, 50, target_recall=0.5)
    tight = ApproximateSearch(vectors, 50, target_recall=1.0)
    assert loose.probes < tight.probes
    assert loose.recall < tight.recall


def test_two_runs_are_identical() -> None:
    vectors = clustered(4000, 8)
    first, second = (ApproximateSearch(vectors, 20, seed=5, target_recall=0.6) for _ in range(2))
    ours, theirs = first.search(vectors, 20), second.search(vectors, 20)
    assert np.array_equal(ours[0], theirs[0])
    assert np.array_equal(ours[1], theirs[1])


@pytest.mark.parametrize("count", [1, 3, 999, 1000])
def test_small_data_are_searched_too(count: int) -> None:
    vectors = clustered(count, 8)
    index = ApproximateSearch(vectors, 20)
    distances, rows = index.search(vectors, 20)
    assert rows.shape == (count, min(20, count))
    assert rows[:, 0].tolist() == list(range(count))
    assert (distances[:, 0] == 0).all()
    assert index.recall > 0.9


def test_a_query_whose_groups_hold_too_little_ends_in_no_row() -> None:
    vectors = clustered(2000, 8)
    index = ApproximateSearch(vectors, 5)
    index.probes = 1
    distances, rows = index.search(vectors[:20], 1500)
    assert (rows == NO_ROW).any(axis=1).all()
    assert np.isinf(distances[rows == NO_ROW]).all()
    assert np.isfinite(distances[rows != NO_ROW]).all()
