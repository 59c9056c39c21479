"""Finding candidates on a CPU by comparing every product with a threshold, instead of keeping the best so far.

Keeping the best of all products costs several times the products themselves. Here a query's scores to a sample of the
database give a threshold that a few more rows than wanted will pass, and a tile of products is then only compared with
it, while it is in cache. For k = 200 and 32 components a pair of 100 k vectors took 1.35 ns of a core, 0.5 of it the
product; faiss, whose own BLAS did not know the core and fell back on its oldest kernels, took 4.8. The threshold is an
estimate, the result is not: every row that passes is a candidate, and a query with fewer than wanted is left to faiss.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from spatial_core.retrieval.flat import Candidates, FlatFaiss
from spatial_core.retrieval.pairs import NO_ROW, Matrix, Metric, Rows, squared_lengths

# A tile of 512 x 512 products, 1 MB, stays in a core's L2 cache: 4 % faster than 256 x 1024, 7 % than 256 x 2048.
BLOCK_QUERIES = 512
_TILE_ROWS = 512
# More rows make a closer threshold and take longer to rank; a quarter of this or twice as many were slower.
_SAMPLE_SHARE = 16
_SAMPLE_ROWS = 16_384  # and no more, so that their products take 32 MB
_CROWD = 4  # times as many candidates as a threshold lets through on average, at most
_LONGEST_SQUARED = 1e37
_SEED = 0


class FlatPruned:
    """Products in torch, a tile at a time, each compared with its query's threshold.

    Args:
        database: (N, D) float32.
        metric: what is compared.
        sample_rows: rows whose scores set the thresholds, at most; a sixteenth of the database where that is less.
    """

    concurrent = True

    def __init__(self, database: Matrix, metric: Metric, sample_rows: int = _SAMPLE_ROWS) -> None:
        self._database: Matrix | None = database
        self._metric = metric
        self._count, self._dim = database.shape
        # A product with an added 1 and an added threshold is what tells, by its sign, who passes:
        # l2: [q, 1, t] [-2x, |x|^2, -1] = |x - q|^2 - (t + |q|^2), ip: [q, 0, t] [-x, 0, 1] = t - qx.
        self._factors = np.empty((self._count, self._dim + 2), np.float32)
        np.multiply(database, -2.0 if metric == "l2" else -1.0, out=self._factors[:, : self._dim])
        squares = squared_lengths(database)
        # Vectors so long that products overflow are none this way could compare.
        usable = squares.max(initial=0) < _LONGEST_SQUARED
        self._factors[:, self._dim] = squares if metric == "l2" and usable else 0
        self._factors[:, self._dim + 1] = -1.0 if metric == "l2" else 1.0
        size = min(sample_rows, self._count // _SAMPLE_SHARE) if usable else 0
        chosen = np.random.default_rng(_SEED).choice(self._count, size, replace=False)
        self._sample = self._factors[np.sort(chosen)]

    def fetch(self, queries: Matrix, count: int) -> Candidates:
        """As `Flat.fetch`; the rows that pass, at least `count` of them and usually twice as many."""
        place = self._place(count)
        if place >= len(self._sample):
            return self._by_faiss(queries, count)
        extended = np.ones((len(queries), self._dim + 2), np.float32)
        extended[:, : self._dim] = queries
        extended[:, self._dim + 1] = limits = self._thresholds(extended, place)
        most = _CROWD * (place + 1) * self._count // len(self._sample)
        rows, found = self._passing(extended, most)
        candidates = Candidates(rows, limits + squared_lengths(queries) if self._metric == "l2" else limits)
        left = np.flatnonzero((found < count) | (found > most))
        return _with(candidates, left, self._by_faiss(queries[left], count)) if len(left) else candidates

    def part(self, ranges: Sequence[tuple[int, int]]) -> FlatPruned:
        """The same over some ranges of rows, one behind the other; rows are counted from the first of them."""
        part = copy.copy(self)
        part._database = None
        part._factors = np.concatenate([self._factors[first:last] for first, last in ranges])
        part._count = len(part._factors)
        part._sample = part._factors[::_SAMPLE_SHARE] if len(self._sample) else self._sample
        return part

    def _by_faiss(self, queries: Matrix, count: int) -> Candidates:
        database = self._database
        if database is None:  # dividing by -2 or -1 gives the vectors back to the last bit
            database = self._factors[:, : self._dim] * np.float32(-0.5 if self._metric == "l2" else -1)
        return FlatFaiss(database, self._metric).fetch(queries, min(count, self._count))

    def _place(self, count: int) -> int:
        """Rank in the sample that is beyond the `count`-th of all but for once in 10 000 queries or less."""
        expected = count * len(self._sample) / self._count
        return int(expected + 4 * np.sqrt(expected) + 2)

    def _thresholds(self, extended: Matrix, place: int) -> npt.NDArray[np.float32]:
        """(Q,) scores of the sampled row at that rank."""
        extended[:, self._dim + 1] = 0
        products = np.empty((len(extended), len(self._sample)), np.float32)
        _product(extended, self._sample, products)
        products.partition(place, axis=1)
        limits: npt.NDArray[np.float32] = products[:, place]
        return limits if self._metric == "l2" else -limits

    def _passing(self, extended: Matrix, most: int) -> tuple[Rows, npt.NDArray[np.int64]]:
        """(Q, M) rows that pass, `NO_ROW` behind the last, and (Q,) how many there are.

        Among equal vectors rounding decides who passes, which may be a large part of the database. A query that more
        than `most` rows pass has none of them in the result; if that many pass for the mean query, no query has any.
        """
        size = min(_TILE_ROWS, self._count)
        number = np.min_scalar_type(len(extended))
        products, passes = np.empty((len(extended), size), np.float32), np.empty((len(extended), size), np.bool_)
        queries, rows, total = [], [], 0
        for start in range(0, self._count, size):
            part = self._factors[start : start + size]
            if len(part) < size:
                products, passes = products[:, : len(part)].copy(), passes[:, : len(part)].copy()
            _product(extended, part, products)
            np.signbit(products, out=passes)
            query, row = np.divmod(np.flatnonzero(passes), len(part))
            queries.append(query.astype(number))
            rows.append(row + start)
            total += len(row)
            if total > most * len(extended):
                return np.empty((len(extended), 0), np.int64), np.zeros(len(extended), np.int64)
        query, row = np.concatenate(queries), np.concatenate(rows)
        found = np.bincount(query, minlength=len(extended))
        if (found > most).any():
            few = (found <= most)[query]
            query, row = query[few], row[few]
        kept = np.where(found > most, 0, found)
        passing = np.full((len(extended), int(kept.max())), NO_ROW, np.int64)
        order = np.argsort(query, kind="stable")  # by radix where 16 bits suffice
        passing[np.arange(passing.shape[1]) < kept[:, None]] = row[order]
        return passing, found


def _product(queries: Matrix, factors: Matrix, out: Matrix) -> None:
    """queries @ factors.T by torch, whose BLAS knows more CPUs and whose threads are set for the thread that calls."""
    import torch

    torch.mm(torch.from_numpy(queries), torch.from_numpy(factors).T, out=torch.from_numpy(out))


def _with(candidates: Candidates, queries: npt.NDArray[np.int64], others: Candidates) -> Candidates:
    """The candidates, those of some queries replaced."""
    width = max(candidates.rows.shape[1], others.rows.shape[1])
    rows = np.full((len(candidates.rows), width), NO_ROW, np.int64)
    rows[:, : candidates.rows.shape[1]] = candidates.rows
    rows[queries] = NO_ROW
    rows[queries, : others.rows.shape[1]] = others.rows
    limits = candidates.limits.copy()
    limits[queries] = others.limits
    return Candidates(rows, limits)
