"""What a ranking in random order scores on average: the floor that every method is read against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Chance:
    """Expected scores of a random ranking: `recall` by k, mean average precision, mean reciprocal rank."""

    recall: dict[int, float]
    mean_average_precision: float
    mean_reciprocal_rank: float


def chance(positives: npt.NDArray[np.int64], others: int, top_k: Sequence[int]) -> Chance:
    """Expectation over all orders of the other images, each equally likely.

    Args:
        positives: (Q,) right answers of each query, at least one each.
        others: images searched a query, right and wrong.
        top_k: the k of recall@k.
    """
    counts, queries = np.unique(positives, return_counts=True)
    share = queries / queries.sum()
    rank = np.arange(1, others + 1, dtype=np.float64)
    recall = dict.fromkeys(map(int, top_k), 0.0)
    average_precision = reciprocal_rank = 0.0
    for right, weight in zip(counts.tolist(), share.tolist(), strict=True):
        # Probability that none of the right answers is among the first r, r = 0 .. others.
        none_yet = np.ones(others + 1)
        for placed in range(right):
            none_yet[1:] *= np.clip(others - rank - placed, 0, None) / (others - placed)
        for k in recall:
            recall[k] += weight * float(1 - none_yet[min(k, others)])
        reciprocal_rank += weight * float(((none_yet[:-1] - none_yet[1:]) / rank).sum())
        # A right answer stands at rank r with probability right / others, with (r - 1) (right - 1) / (others - 1)
        # further ones expected before it.
        before = (rank - 1) * (right - 1) / max(others - 1, 1)
        average_precision += weight * float(((1 + before) / rank).mean())
    return Chance(recall, average_precision, reciprocal_rank)
