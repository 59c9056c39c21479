"""Searching by a threshold against faiss: the same bytes, also with a wrong threshold or many equal vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from spatial_core.retrieval.flat import Candidates, FlatFaiss
from spatial_core.retrieval.pairs import NO_ROW, Metric
from spatial_core.retrieval.pruned import FlatPruned
from spatial_core.retrieval.search import ExactSearch

Floats = npt.NDArray[np.float32]

LEFT: list[int] = []


@pytest.fixture(autouse=True)
def left_to_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the queries that are left to faiss."""
    LEFT.clear()
    fetch = FlatFaiss.fetch

    def counted(self: FlatFaiss, queries: Any, count: int) -> Candidates:
        LEFT.append(len(queries))
        return fetch(self, queries, count)

    monkeypatch.setattr(FlatFaiss, "fetch", counted)


def vectors(count: int, dim: int, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((20, dim))
    return (centres[rng.integers(0, 20, count)] + 0.3 * rng.standard_normal((count, dim))).astype(np.float32)


def require_same(database: Floats, queries: Floats, k: int, metric: Metric, flat: FlatPruned | None = None) -> int:
    """Both ways give the same bytes; returns how many queries the pruned one left to faiss."""
    found = ExactSearch(database, metric=metric, threads=2, flat=flat).search(queries, k)
    left = sum(LEFT)
    expected = ExactSearch(database, metric=metric, flat=FlatFaiss(database, metric)).search(queries, k)
    assert np.array_equal(found[1], expected[1])
    assert np.array_equal(found[0], expected[0])
    return left


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(("dim", "k", "count"), [(32, 200, 5000), (3, 1, 5000), (100, 10, 1537), (32, 50, 20_001)])
def test_same_bytes_as_faiss(metric: Metric, dim: int, k: int, count: int) -> None:
    database = vectors(count, dim)
    assert require_same(database, database[:1300], k, metric) < 30


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_far_from_the_origin(metric: Metric) -> None:
    database = vectors(4000, 16) * np.float32(0.01) + np.float32(100)
    require_same(database, database[:600], 20, metric)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dim", [4, 32])
def test_many_ties(metric: Metric, dim: int) -> None:
    database = np.random.default_rng(0).integers(-1, 2, (4000, dim)).astype(np.float32)
    require_same(database, database[:600], 30, metric)


def test_thresholds_that_too_few_pass_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlatPruned, "_place", lambda self, count: 0)
    database = vectors(5000, 32)
    assert require_same(database, database[:600], 100, "l2") > 500


def test_equal_vectors_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    most: list[int] = []
    passing = FlatPruned._passing

    def measured(self: FlatPruned, extended: Any, limit: int) -> Any:
        rows, found = passing(self, extended, limit)
        most.append(rows.shape[1])
        return rows, found

    monkeypatch.setattr(FlatPruned, "_passing", measured)
    database = vectors(20_000, 32)
    database[5000:] = database[0] + np.float32(1e-3)
    assert require_same(database, database[:600], 20, "l2") > 0
    LEFT.clear()
    assert require_same(database, database[-600:], 20, "l2") > 0
    assert max(most) <= 2000


def test_a_crowded_query_leaves_the_others_as_they_are() -> None:
    database = vectors(20_000, 32)
    database[12_000:] = database[0] * np.float32(1.0001)  # 8000 rows beside one query, far from most others
    queries = np.concatenate([database[:1], database[100:300]])
    left = require_same(database, queries, 20, "l2")
    assert 1 <= left < 100


def test_vectors_too_long_for_products_are_left_to_faiss() -> None:
    database = vectors(3000, 4) * np.float32(1e19)
    assert require_same(database, database[:50], 5, "ip") == 50


def test_candidates_hold_every_row_within_the_limit() -> None:
    database = vectors(6000, 8)
    found = FlatPruned(database, "l2").fetch(database[:300], 40)
    exact = ((database[:300, None].astype(np.float64) - database[None]) ** 2).sum(2)
    for query, limit in enumerate(found.limits):
        rows = found.rows[query][found.rows[query] != NO_ROW]
        assert len(rows) >= 40
        assert len(set(rows.tolist())) == len(rows)
        assert set(np.flatnonzero(exact[query] < limit - 1e-4)) <= set(rows.tolist())
        assert exact[query][rows].max() <= limit + 1e-4
