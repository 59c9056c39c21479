"""Finding candidates among all vectors by matrix products, in blocks of bounded memory: faiss on CPU, torch on a GPU.

Candidates come unordered, chosen by scores that carry the rounding of the product; `search` computes them anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from spatial_core.retrieval.pairs import Matrix, Metric, Rows
from spatial_core.retrieval.side_by_side import full_float32
from spatial_core.storage.hardware import usable_cores

# float32 scores held at once by the torch search: 512 MB on a GPU, a share of the cache on a CPU.
_CUDA_SCORES = 1 << 27
_CPU_SCORES = 1 << 22
_TORCH_QUERIES = 2048


@dataclass(frozen=True)
class Candidates:
    """Rows that may be among the best of Q queries.

    Args:
        rows: (Q, M) rows of the database, in any order, `NO_ROW` where a query has fewer.
        limits: (Q,) up to rounding, no row that is missing scores better than this.
    """

    rows: Rows
    limits: npt.NDArray[np.floating]


class Flat(Protocol):
    """Candidates by exhaustive comparison."""

    @property
    def concurrent(self) -> bool:
        """Whether small blocks are to be fetched side by side, each on one thread, rather than large ones on all."""

    def fetch(self, queries: Matrix, count: int) -> Candidates:
        """(Q, D) queries -> at least their `count` best rows, up to rounding."""


@contextlib.contextmanager
def faiss_threads(threads: int) -> Iterator[None]:
    """Let faiss use so many threads inside the block; 0 = the cores this process may use."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads or usable_cores())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


class FlatFaiss:
    """faiss over the matrix itself, without a copy."""

    concurrent = False

    def __init__(self, database: Matrix, metric: Metric) -> None:
        self._database = database
        self._metric = metric

    def fetch(self, queries: Matrix, count: int) -> Candidates:
        import faiss

        metric = faiss.METRIC_L2 if self._metric == "l2" else faiss.METRIC_INNER_PRODUCT
        scores, rows = faiss.knn(queries, self._database, count, metric=metric)
        return Candidates(rows, _worst(scores, self._metric))


class FlatTorch:
    """Products and top-k in torch, block by block, on a device that holds the whole database."""

    concurrent = False

    def __init__(self, database: Matrix, metric: Metric, device: str, scores: int = 0) -> None:
        import torch

        self._metric = metric
        self._database = torch.from_numpy(database).to(device)
        self._squares = self._database.square().sum(1)
        self._scores = scores or (_CUDA_SCORES if self._database.is_cuda else _CPU_SCORES)

    def fetch(self, queries: Matrix, count: int) -> Candidates:
        step = min(_TORCH_QUERIES, max(1, self._scores // max(1, count)))
        parts = [self._fetch_block(queries[start : start + step], count) for start in range(0, len(queries), step)]
        scores = np.concatenate([scores for scores, _ in parts])
        return Candidates(np.concatenate([rows for _, rows in parts]), _worst(scores, self._metric))

    def _fetch_block(self, queries: Matrix, count: int) -> tuple[Matrix, Rows]:
        import torch

        block = torch.from_numpy(queries).to(self._database.device)
        best = torch.empty(len(block), 0, device=block.device)
        rows = torch.empty(len(block), 0, dtype=torch.int64, device=block.device)
        step = max(1, self._scores // len(block))
        largest = self._metric == "ip"
        with full_float32(), torch.inference_mode():
            for start in range(0, len(self._database), step):
                part = self._database[start : start + step].T
                if largest:
                    scores = block @ part
                else:
                    scores = torch.addmm(self._squares[None, start : start + step], block, part, alpha=-2)
                near, at = scores.topk(min(count, scores.shape[1]), largest=largest, sorted=False)
                best, rows = torch.cat([best, near], 1), torch.cat([rows, at + start], 1)
                best, at = best.topk(min(count, best.shape[1]), largest=largest, sorted=False)
                rows = rows.gather(1, at)
            if not largest:
                best = best + block.square().sum(1, keepdim=True)
        return best.cpu().numpy(), rows.cpu().numpy()


def _worst(scores: Matrix, metric: Metric) -> Matrix:
    worst: Matrix = scores.max(axis=1) if metric == "l2" else scores.min(axis=1)
    return worst
