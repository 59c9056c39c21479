"""Exact k nearest neighbours, the same to the last bit and tie on CPU and GPU.

A few more candidates than asked for are found by matrix products, scored anew from their differences and sorted by
score, then row. The rounding error of the products is bounded, so a query whose last candidate is too close to its
k-th neighbour for that bound (many equal vectors, say) is noticed, and searched again among all rows in question.

Memory: the database, on a CPU a copy of it with two more columns, 8 bytes for each of its rows, and for a block of
queries about 40 bytes a candidate and 32 MB of products a thread.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spatial_core.retrieval.flat import Flat, FlatTorch, faiss_threads
from spatial_core.retrieval.pairs import (
    NO_ROW,
    Matrix,
    Metric,
    Rows,
    as_matrix,
    nearest_first,
    pair_scores,
    require_rows,
    squared_lengths,
)
from spatial_core.retrieval.pruned import BLOCK_QUERIES, FlatPruned
from spatial_core.retrieval.side_by_side import full_float32, in_threads
from spatial_core.storage.hardware import usable_cores

_SPARE = 16  # candidates beyond k: enough that the bound decides for all but repeated vectors
_BLOCK_CANDIDATES = 4 << 20
_DOUBTFUL_SCORES = 8 << 20  # scores held at once when doubtful queries are searched again: 32 MB


class ExactSearch:
    """Exhaustive search of one database.

    Args:
        database: (N, D) finite floats.
        metric: `l2` for Euclidean distance, nearest first; `ip` for inner product, largest first.
        device: `cpu`, or a CUDA device that holds the database.
        threads: CPU threads, 0 = the cores this process may use.
        block: queries at once, 0 = what keeps a block of candidates near 200 MB.
        flat: finds the candidates; chosen by `device` when None.

    Raises:
        InputError: if the vectors are no finite matrix.
    """

    def __init__(
        self,
        database: npt.NDArray[np.floating],
        *,
        metric: Metric = "l2",
        device: str = "cpu",
        threads: int = 0,
        block: int = 0,
        flat: Flat | None = None,
    ) -> None:
        self.database = as_matrix(database, "database")
        require_rows(len(self.database))
        self.metric: Metric = metric
        self._threads = threads
        self._block = block
        if flat is None:
            on_cpu = device == "cpu"
            flat = FlatPruned(self.database, metric) if on_cpu else FlatTorch(self.database, metric, device)
        self._flat = flat
        self._squares = squared_lengths(self.database)

    def search(self, queries: npt.NDArray[np.floating], k: int) -> tuple[Matrix, Rows]:
        """The k best of N database rows for each query, min(k, N) where there are fewer.

        Args:
            queries: (Q, D) finite floats.
            k: neighbours wanted.

        Returns:
            (Q, k) float32 Euclidean distances or inner products, best first, and (Q, k) int64 database rows; equal
            scores are ordered by row.
        """
        matrix = as_matrix(queries, "queries")
        k = min(k, len(self.database))
        scores, rows = np.empty((len(matrix), k), np.float32), np.empty((len(matrix), k), np.int64)

        threads = self._threads or usable_cores()
        step = self._block or max(1, _BLOCK_CANDIDATES // (k + _SPARE))
        if self._flat.concurrent:
            step = max(1, min(step, BLOCK_QUERIES, -(-len(matrix) // threads)))
        parts = [slice(start, start + step) for start in range(0, len(matrix) if k else 0, step)]
        alone = not self._flat.concurrent or len(parts) == 1

        def search_part(part: slice) -> None:
            with faiss_threads(threads if alone else 1):
                scores[part], rows[part] = self._search_block(matrix[part], k)

        with full_float32():
            in_threads(search_part, parts, threads, alone=alone)
        return np.sqrt(scores, out=scores) if self.metric == "l2" else scores, rows

    def _search_block(self, queries: Matrix, k: int) -> tuple[Matrix, Rows]:
        if k + _SPARE >= len(self.database):
            rows = np.tile(np.arange(len(self.database)), (len(queries), 1))
            return nearest_first(pair_scores(queries, self.database, rows, self.metric), rows, self.metric, k)
        found = self._flat.fetch(queries, k + _SPARE)
        scores = pair_scores(queries, self.database, found.rows, self.metric)
        scores, rows = nearest_first(scores, found.rows, self.metric, k)
        sign = 1.0 if self.metric == "l2" else -1.0
        # Nothing that was not fetched can beat, or tie with, the k-th unless it lies within the bound of it.
        limit = sign * scores[:, -1].astype(np.float64) + self._bound(queries, scores[:, -1])
        doubtful = np.flatnonzero(~(sign * found.limits.astype(np.float64) > limit))  # no number is doubtful too
        step = max(1, _DOUBTFUL_SCORES // len(self.database))
        for start in range(0, len(doubtful), step):
            part = doubtful[start : start + step]
            scores[part], rows[part] = self._search_all(queries[part], sign * limit[part], k)
        return scores, rows

    def _bound(self, queries: Matrix, kth: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """(Q,) how far a product's score may lie from the true one, for rows that are as good as the k-th.

        D products and sums in float32 err by at most (D + 4) units of 2^-24 of the lengths involved; four times that,
        to cover a limit that is part of the sum and the rounding of the scores themselves. A row within sqrt(kth) of
        the query is at most that much longer.
        """
        unit = 4.0 * (queries.shape[1] + 8) * 2.0**-24
        length = np.sqrt(squared_lengths(queries))
        reach = np.sqrt(self._squares.max()) if self.metric == "ip" else 2 * length + np.sqrt(kth.astype(np.float64))
        bound: npt.NDArray[np.float64] = unit * reach * (length if self.metric == "ip" else reach)
        return bound

    def _search_all(self, queries: Matrix, limit: npt.NDArray[np.float64], k: int) -> tuple[Matrix, Rows]:
        """Score every row whose product is not worse than the limit, in which the bound is included."""
        products = queries @ self.database.T
        if self.metric == "l2":
            chosen = squared_lengths(queries)[:, None] + self._squares[None] - 2.0 * products <= limit[:, None]
        else:
            chosen = products >= limit[:, None]
        counts = chosen.sum(axis=1)
        rows = np.full((len(queries), int(counts.max())), NO_ROW, dtype=np.int64)
        rows[np.arange(rows.shape[1]) < counts[:, None]] = np.nonzero(chosen)[1]
        return nearest_first(pair_scores(queries, self.database, rows, self.metric), rows, self.metric, k)


def search(
    queries: npt.NDArray[np.floating],
    database: npt.NDArray[np.floating],
    k: int,
    *,
    metric: Metric = "l2",
    device: str = "cpu",
    threads: int = 0,
    block: int = 0,
) -> tuple[Matrix, Rows]:
    """Exact k nearest neighbours of (Q, D) queries in an (N, D) database: `ExactSearch` for a single call."""
    return ExactSearch(database, metric=metric, device=device, threads=threads, block=block).search(queries, k)
