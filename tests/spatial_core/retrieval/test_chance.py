"""Closed forms against every order there is."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from spatial_core.retrieval.chance import chance

TOP_K = (1, 2, 5, 100)


def by_enumeration(right: int, others: int) -> tuple[list[float], float, float]:
    recalls, precisions, reciprocals = [], [], []
    for places in combinations(range(1, others + 1), right):
        recalls.append([places[0] <= k for k in TOP_K])
        precisions.append(np.mean([(hit + 1) / place for hit, place in enumerate(places)]))
        reciprocals.append(1 / places[0])
    return np.mean(recalls, axis=0).tolist(), float(np.mean(precisions)), float(np.mean(reciprocals))


@pytest.mark.parametrize(("right", "others"), [(1, 1), (1, 7), (2, 8), (3, 9), (5, 6), (4, 4)])
def test_one_query(right: int, others: int) -> None:
    recall, precision, reciprocal = by_enumeration(right, others)
    found = chance(np.array([right]), others, TOP_K)
    assert list(found.recall.values()) == pytest.approx(recall)
    assert found.mean_average_precision == pytest.approx(precision)
    assert found.mean_reciprocal_rank == pytest.approx(reciprocal)


def test_queries_are_averaged() -> None:
    mixed = chance(np.array([1, 3, 3, 1, 1]), 9, TOP_K)
    one, three = chance(np.array([1]), 9, TOP_K), chance(np.array([3]), 9, TOP_K)
    assert mixed.recall[2] == pytest.approx(0.6 * one.recall[2] + 0.4 * three.recall[2])
    assert mixed.mean_reciprocal_rank == pytest.approx(
        0.6 * one.mean_reciprocal_rank + 0.4 * three.mean_reciprocal_rank
    )
