"""Scores of chosen pairs of vectors, and their order: what every search here ends with.

A matrix product gives |q - x|^2 as the small difference of large numbers. Searches use that to find candidates only;
the scores they hand out are computed here from the differences themselves, so equal vectors are exactly 0 apart and
equal rows score equally wherever they stand. Ties are broken by row, so results do not depend on block sizes, threads
or devices.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spatial_core.errors import InputError

Metric = Literal["l2", "ip"]
Matrix = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

NO_ROW = -1
_MAX_ROWS = 2**32 - 1
_SIGN = np.uint32(1 << 31)


def as_matrix(vectors: npt.NDArray[np.floating], name: str) -> Matrix:
    """(N, D) floats as C-contiguous float32, without a copy where they are that already.

    Raises:
        InputError: if it is no matrix, or a value is not finite.
    """
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise InputError(f"{name}: expected a matrix of vectors, found shape {vectors.shape}")
    matrix = np.ascontiguousarray(vectors, dtype=np.float32)
    # The sum is finite unless a value is not, or values overflow together; only then is each one looked at.
    with np.errstate(over="ignore", invalid="ignore"):
        suspect = not np.isfinite(matrix.sum())
    if suspect and not np.isfinite(matrix).all():
        row = int(np.flatnonzero(~np.isfinite(matrix).all(axis=1))[0])
        raise InputError(f"{name}: vector {row} of {len(matrix)} has values that are not finite")
    return matrix


def squared_lengths(vectors: Matrix) -> npt.NDArray[np.float64]:
    """(N,) squared length of each vector, in float64 without a float64 copy of the matrix."""
    squares: npt.NDArray[np.float64] = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64, casting="same_kind")
    return squares


def pair_scores(queries: Matrix, database: Matrix, rows: Rows, metric: Metric) -> Matrix:
    """(Q, D) queries and (Q, K) rows of an (N, D) database -> (Q, K) squared distances or inner products.

    `NO_ROW` scores the worst there is: infinity, or minus infinity for inner products.
    """
    import faiss

    library: Any = faiss  # its type stubs do not list these two functions
    function = library.fvec_L2sqr_by_idx if metric == "l2" else library.fvec_inner_products_by_idx
    scores = np.empty(rows.shape, np.float32)
    held = (scores, np.ascontiguousarray(queries), database, np.ascontiguousarray(rows))
    function(*(library.swig_ptr(array) for array in held), queries.shape[1], *rows.shape)
    if metric == "ip":
        scores[rows == NO_ROW] = -np.inf
    return scores


def nearest_first(scores: Matrix, rows: Rows, metric: Metric, k: int) -> tuple[Matrix, Rows]:
    """Sort (Q, K) candidates by score, then row, and keep the first k."""
    # One integer a candidate, the score's bits above the row's: sorting them is several times faster than a stable
    # sort by two keys.
    packed = _sortable(scores, metric).astype(np.uint64) << np.uint64(32)
    packed |= rows.astype(np.uint32)
    packed.sort(axis=1)
    packed = packed[:, :k]
    kept = packed.astype(np.uint32).astype(np.int64)
    kept[kept == _MAX_ROWS] = NO_ROW
    return _scores_of((packed >> np.uint64(32)).astype(np.uint32), metric), kept


def _sortable(scores: Matrix, metric: Metric) -> npt.NDArray[np.uint32]:
    """Bits whose order is the order of the scores, best first. Those of floats of one sign already are in order."""
    if metric == "l2":
        return np.ascontiguousarray(scores).view(np.uint32)
    # Subtracting from 0 leaves no -0, which would sort beside 0 but not as its equal.
    bits = np.ascontiguousarray(np.float32(0) - scores).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | _SIGN)


def _scores_of(bits: npt.NDArray[np.uint32], metric: Metric) -> Matrix:
    """Inverse of `_sortable`."""
    if metric == "l2":
        return bits.view(np.float32)
    return np.float32(0) - np.where(bits >> 31, bits ^ _SIGN, ~bits).view(np.float32)


def require_rows(count: int) -> None:
    """Refuse a database whose rows do not fit 32 bits.

    Raises:
        InputError: naming the size.
    """
    if count >= _MAX_ROWS:
        raise InputError(f"a database of {count} vectors; rows are searched in 32 bits, at most {_MAX_ROWS - 1}")
