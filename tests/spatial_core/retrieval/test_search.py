"""Exact search against sorting all distances, on vectors with many ties; the same bytes whatever found them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_core.errors import InputError
from spatial_core.retrieval import search as module
from spatial_core.retrieval.flat import FlatTorch
from spatial_core.retrieval.pairs import NO_ROW, Metric, nearest_first, pair_scores
from spatial_core.retrieval.search import ExactSearch, search

Floats = npt.NDArray[np.float32]


def plain(queries: Floats, database: Floats, k: int, metric: Metric) -> tuple[Floats, npt.NDArray[np.int64]]:
    """All scores of integer-valued vectors, which float32 represents exactly, sorted by score then row."""
    scores, rows = [], []
    for query in queries.astype(np.float64):
        values = [
            float(((query - vector) ** 2).sum()) if metric == "l2" else -float(query @ vector)
            for vector in database.astype(np.float64)
        ]
        order = sorted(range(len(values)), key=lambda row: (values[row], row))[:k]
        rows.append(order)
        scores.append([values[row] ** 0.5 if metric == "l2" else -values[row] for row in order])
    shape = (len(queries), min(k, len(database)))
    return np.array(scores, np.float32).reshape(shape), np.array(rows, np.int64).reshape(shape)


def integers(seed: int, count: int, dim: int, spread: int) -> Floats:
    """Vectors of few small integers: many are equal, and many distances tie."""
    return np.random.default_rng(seed).integers(-spread, spread + 1, (count, dim)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(0, 12),
    size=st.integers(0, 90),
    k=st.integers(1, 40),
    dim=st.sampled_from([1, 3, 32]),
    spread=st.sampled_from([0, 1, 20]),
    metric=st.sampled_from(["l2", "ip"]),
    in_torch=st.booleans(),
)
def test_agrees_with_sorting_everything(
    *, seed: int, count: int, size: int, k: int, dim: int, spread: int, metric: Metric, in_torch: bool
) -> None:
    queries, database = integers(seed, count, dim, spread), integers(seed + 1, size, dim, spread)
    flat = FlatTorch(database, metric, "cpu", scores=50) if in_torch else None
    scores, rows = ExactSearch(database, metric=metric, block=5, flat=flat).search(queries, k)
    expected_scores, expected_rows = plain(queries, database, k, metric)
    assert rows.tolist() == expected_rows.tolist()
    assert scores.tolist() == expected_scores.tolist()
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64


def clustered(count: int, dim: int, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((20, dim))
    return (centres[rng.integers(0, 20, count)] + 0.3 * rng.standard_normal((count, dim))).astype(np.float32)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_torch_and_faiss_give_the_same_bytes(metric: Metric, precision: str) -> None:
    vectors = clustered(3000, 32)
    vectors[1000:1100] = vectors[17]  # a hundred equal images, more than are fetched beyond k
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours = ExactSearch(vectors, metric=metric, threads=1).search(vectors[:1200], 50)
        blocks = ExactSearch(vectors, metric=metric, threads=2, block=77).search(vectors[:1200], 50)
        flat = FlatTorch(vectors, metric, "cpu", scores=100_000)
        in_torch = ExactSearch(vectors, metric=metric, flat=flat).search(vectors[:1200], 50)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    for other in (blocks, in_torch):
        assert np.array_equal(ours[0], other[0])
        assert np.array_equal(ours[1], other[1])


def test_equal_vectors_are_found_in_row_order_at_distance_zero() -> None:
    vectors = clustered(500, 16)
    vectors[200:] = vectors[200]
    distances, rows = search(vectors[250:253], vectors, 30)
    assert (distances == 0).all()
    assert rows.tolist() == [list(range(200, 230))] * 3


def test_near_and_far_from_the_origin_distances_are_those_of_float64() -> None:
    # A matrix product alone would lose all digits here: lengths of 1000, distances of 0.01.
    rng = np.random.default_rng(0)
    vectors = (1000 / 8 + 1e-3 * rng.standard_normal((400, 64))).astype(np.float32)
    distances, rows = search(vectors, vectors, 20)
    exact = np.linalg.norm(vectors[:, None].astype(np.float64) - vectors[None], axis=2)
    assert distances == pytest.approx(np.sort(exact, axis=1)[:, :20], rel=1e-5, abs=1e-12)
    assert np.take_along_axis(exact, rows, 1) == pytest.approx(distances, rel=1e-5, abs=1e-12)


def test_a_doubtful_query_is_searched_again_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    again: list[int] = []
    search_all = ExactSearch._search_all

    def counted(self: ExactSearch, queries: Any, limit: Any, k: int) -> Any:
        again.append(len(queries))
        return search_all(self, queries, limit, k)

    monkeypatch.setattr(ExactSearch, "_search_all", counted)
    vectors = clustered(2000, 32)
    search(vectors, vectors, 50)
    assert not again
    vectors[:300] = vectors[0]
    search(vectors, vectors, 50)
    assert sum(again) >= 300
    monkeypatch.setattr(module, "_DOUBTFUL_SCORES", 2000 * 7)
    again.clear()
    search(vectors, vectors, 50)
    assert max(again) == 7


def test_fewer_rows_than_asked_for() -> None:
    vectors = clustered(7, 4)
    distances, rows = search(vectors[:2], vectors, 100)
    assert rows.shape == distances.shape == (2, 7)
    assert sorted(rows[0].tolist()) == list(range(7))
    distances, rows = search(vectors[:2], np.empty((0, 4), np.float32), 5)
    assert rows.shape == distances.shape == (2, 0)


def test_inputs_are_taken_in_any_layout() -> None:
    vectors = clustered(300, 8)
    expected = search(vectors[:40], vectors, 5)
    strided = np.asfortranarray(vectors.astype(np.float64))
    found = search(strided[:40], strided, 5)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused(value: float) -> None:
    vectors = clustered(20, 4)
    vectors[3, 2] = value
    with pytest.raises(InputError, match="database: vector 3 of 20"):
        search(vectors[:1], vectors, 2)
    with pytest.raises(InputError, match="queries: vector 3 of 20"):
        search(vectors, clustered(20, 4), 2)
    with pytest.raises(InputError, match="expected a matrix"):
        search(clustered(20, 4)[0], clustered(20, 4), 2)


def test_large_finite_vectors_are_not_mistaken_for_infinite_ones() -> None:
    vectors = np.full((4, 2), 1e38, np.float32)
    _, rows = search(vectors[:1], vectors, 2)
    assert rows.tolist() == [[0, 1]]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(width=32, allow_nan=False), st.integers(0, 2**32 - 2)), min_size=1, max_size=20))
def test_order_is_by_score_then_row_for_every_float(candidates: list[tuple[float, int]]) -> None:
    scores = np.array([[score for score, _ in candidates]], np.float32)
    rows = np.array([[row for _, row in candidates]])
    best, found = nearest_first(scores, rows, "ip", len(candidates))
    expected = sorted(candidates, key=lambda pair: (-pair[0], pair[1]))
    assert found[0].tolist() == [row for _, row in expected]
    assert best[0].tolist() == [score for score, _ in expected]
    best, found = nearest_first(np.abs(scores), rows, "l2", 3)
    expected = sorted([(abs(score), row) for score, row in candidates])[:3]
    assert list(zip(best[0].tolist(), found[0].tolist(), strict=True)) == expected


def test_no_row_is_last_and_stays_no_row() -> None:
    vectors = clustered(5, 4)
    rows = np.array([[NO_ROW, 2, NO_ROW, 4]])
    for metric, worst in (("l2", np.inf), ("ip", -np.inf)):
        scores = pair_scores(vectors[:1], vectors, rows, metric)  # type: ignore[arg-type]
        assert (scores[0, [0, 2]] == worst).all()
        best, found = nearest_first(scores, rows, metric, 4)  # type: ignore[arg-type]
        assert found[0, 2:].tolist() == [NO_ROW, NO_ROW]
        assert (best[0, 2:] == worst).all()
