"""Counting against sorting and selection against a loop: the same results on any data, ties and odd tiles included."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spatial_core.errors import InputError
from spatial_core.retrieval.metrics import TIE, retrieval_metrics, select_queries

TOP_K = (1, 2, 5, 1000)


def by_sorting(vectors: Tensor, labels: Tensor, query: int) -> tuple[int, float]:
    """First rank and average precision of one query, from a full sort; wrong images win ties."""
    found = []
    for row in range(len(vectors)):
        if row != query:
            cosine = sum(float(a) * float(b) for a, b in zip(vectors[query], vectors[row], strict=True))
            right = bool(labels[row] == labels[query])
            found.append((-cosine, right))
    hits, precisions, first = 0, [], 0
    for rank, (_, right) in enumerate(sorted(found), start=1):
        if right:
            hits += 1
            precisions.append(hits / rank)
            first = first or rank
    return first, sum(precisions) / len(precisions)


def check(vectors: Tensor, labels: Tensor, block_bytes: int | None = None) -> None:
    queries = select_queries(labels, 10_000, 0, seed=1)
    result = retrieval_metrics(vectors, labels, queries, TOP_K, block_bytes=block_bytes)
    expected = [by_sorting(vectors, labels, int(row)) for row in queries]
    assert result.first_rank.tolist() == [first for first, _ in expected]
    np.testing.assert_allclose(result.average_precision.numpy(), [precision for _, precision in expected], rtol=1e-12)
    for k in TOP_K:
        assert result.recall[k] == pytest.approx(np.mean([first <= k for first, _ in expected]), abs=1e-12)
    assert result.mean_average_precision == pytest.approx(np.mean([precision for _, precision in expected]))
    assert result.mean_reciprocal_rank == pytest.approx(np.mean([1 / first for first, _ in expected]))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 6), min_size=4, max_size=40).filter(lambda labels: len(set(labels)) < len(labels)),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 64, 500, None]),
)
def test_random_vectors_agree_with_a_sort(labels: list[int], seed: int, block_bytes: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(len(labels), 8, generator=generator, dtype=torch.float64))
    check(vectors.float(), torch.tensor(labels) * 10_000_000_019 - 5, block_bytes)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 4), min_size=4, max_size=40).filter(lambda labels: len(set(labels)) < len(labels)),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 64, None]),
)
def test_planted_ties_agree_with_a_sort_that_lets_wrong_images_win(
    labels: list[int], seed: int, block_bytes: int | None
) -> None:
    # Sign vectors of length 1: cosines are multiples of 1/2, exactly, so most of them are tied.
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (len(labels), 4), generator=generator) * 2.0 - 1.0
    check(signs / 2, torch.tensor(labels), block_bytes)


def test_more_queries_than_a_block_and_buildings_of_many_sizes() -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.cat([torch.full((size,), size) for size in range(1, 12)] * 9)
    vectors = torch.nn.functional.normalize(torch.randn(len(labels), 6, generator=generator))
    queries = select_queries(labels, 10_000, 0, seed=2)
    assert len(queries) > 512
    whole = retrieval_metrics(vectors, labels, queries, TOP_K)
    for part in queries.split(100):
        rows = [int((queries == row).nonzero()) for row in part]
        assert torch.equal(retrieval_metrics(vectors, labels, part, TOP_K).first_rank, whole.first_rank[rows])
    first, precision = by_sorting(vectors, labels, int(queries[17]))
    assert (int(whole.first_rank[17]), float(whole.average_precision[17])) == (first, pytest.approx(precision))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_nothing_and_is_left_as_it_was(threads: int) -> None:
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(0, 200, (900,), generator=generator)
    vectors = torch.nn.functional.normalize(torch.randn(900, 24, generator=generator))
    queries = select_queries(labels, 10_000, 0, seed=2)
    expected = retrieval_metrics(vectors, labels, queries, TOP_K)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = retrieval_metrics(vectors, labels, queries, TOP_K)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.first_rank, expected.first_rank)
    assert torch.equal(found.average_precision, expected.average_precision)


def test_a_collapsed_space_scores_nothing() -> None:
    labels = torch.arange(300) // 3
    vectors = torch.nn.functional.normalize(torch.ones(300, 257)) * (1 + 1e-8)
    result = retrieval_metrics(vectors, labels, torch.arange(300), (1, 100, 298))
    assert result.recall == {1: 0.0, 100: 0.0, 298: 1.0}
    assert set(result.first_rank.tolist()) == {298}


def test_a_difference_below_the_tie_counts_as_a_tie_and_one_above_does_not() -> None:
    def rank(gap: float) -> int:
        angles = torch.tensor([0.0, math.pi / 2, math.pi / 2 + gap], dtype=torch.float64)
        vectors = torch.stack([angles.cos(), angles.sin()], dim=1).float()
        return int(retrieval_metrics(vectors, torch.tensor([0, 0, 1]), torch.tensor([0]), (1,)).first_rank)

    assert rank(TIE / 4) == 2
    assert rank(TIE * 4) == 1


def test_values_that_are_not_finite_never_help() -> None:
    vectors = torch.eye(4)[[0, 0, 1, 1, 2]]
    labels = torch.tensor([0, 0, 1, 1, 2])
    sound = retrieval_metrics(vectors, labels, torch.tensor([0, 2]), (1,))
    assert sound.recall[1] == 1.0
    wrong, right, query = vectors.clone(), vectors.clone(), vectors.clone()
    wrong[4] = torch.nan
    right[1] = torch.nan
    query[0] = torch.inf
    assert retrieval_metrics(wrong, labels, torch.tensor([0]), (1,)).first_rank.tolist() == [2]
    assert retrieval_metrics(right, labels, torch.tensor([0]), (1,)).first_rank.tolist() == [4]
    assert retrieval_metrics(query, labels, torch.tensor([0]), (1,)).first_rank.tolist() == [4]


def test_float16_gives_the_numbers_of_the_same_values_in_float32() -> None:
    generator = torch.Generator().manual_seed(5)
    vectors = torch.nn.functional.normalize(torch.randn(200, 16, generator=generator)).half()
    labels, queries = torch.arange(200) // 2, torch.arange(200)
    halves = retrieval_metrics(vectors, labels, queries, TOP_K)
    assert torch.equal(halves.first_rank, retrieval_metrics(vectors.float(), labels, queries, TOP_K).first_rank)


def test_coarse_matmul_left_on_by_training_changes_nothing_and_is_left_on() -> None:
    generator = torch.Generator().manual_seed(6)
    vectors = torch.nn.functional.normalize(torch.randn(300, 64, generator=generator))
    labels, queries = torch.arange(300) // 3, torch.arange(300)
    expected = retrieval_metrics(vectors, labels, queries, TOP_K)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = retrieval_metrics(vectors, labels, queries, TOP_K)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.first_rank, expected.first_rank)


def test_impossible_queries_are_refused() -> None:
    vectors, labels = torch.eye(3), torch.tensor([0, 0, 1])
    with pytest.raises(InputError, match="no query"):
        retrieval_metrics(vectors, labels, torch.tensor([], dtype=torch.int64), (1,))
    with pytest.raises(InputError, match="row 2 is the only image"):
        retrieval_metrics(vectors, labels, torch.tensor([0, 2]), (1,))


@given(st.lists(st.integers(-3, 8), max_size=60), st.integers(0, 4), st.integers(0, 5))
def test_the_first_images_of_buildings_with_two_or_more(labels: list[int], limit: int, seed: int) -> None:
    sizes, seen, expected = Counter(labels), Counter[int](), []
    for row, label in enumerate(labels):
        if sizes[label] > 1 and (limit == 0 or seen[label] < limit):
            expected.append(row)
        seen[label] += 1
    chosen = select_queries(torch.tensor(labels, dtype=torch.int64), 1000, limit, seed)
    assert chosen.dtype == torch.int64
    assert sorted(chosen.tolist()) == expected
    assert select_queries(torch.tensor(labels, dtype=torch.int64), 3, limit, seed).tolist() == chosen[:3].tolist()


def test_the_seed_decides_which_are_kept() -> None:
    labels = torch.arange(200) // 2
    kept = [select_queries(labels, 20, 1, seed).tolist() for seed in (0, 0, 1)]
    assert kept[0] == kept[1]
    assert kept[0] != kept[2]
    assert all(row % 2 == 0 for row in kept[0])
