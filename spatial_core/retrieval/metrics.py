"""How well vectors find other images of the same building: the choice of queries, recall@k, mAP, reciprocal rank.

Nothing is sorted. The rank of a right answer is one more than the number of wrong images that score at least as high,
so a pass over cache-sized tiles of the similarity matrix that only compares and counts gives the numbers a full sort
would give. A tile is counted while it is still in cache, which is why small ones are faster than large ones on a CPU.

Ties are counted against the model: a wrong image whose cosine lies within `TIE` of a right one ranks above it. Vectors
that collapsed to a single point therefore score nothing, and the result does not depend on the tile size or device,
whose float32 sums differ in the last bits. In the same spirit a vector that is not finite never ranks well: as a wrong
image it is above, as a right one below all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spatial_core.errors import InputError
from spatial_core.retrieval.side_by_side import full_float32, in_threads

# Float32 dot products of unit vectors of up to 4096 values were off by 3.5e-7 at most, so two kernels differ by less.
TIE = 1e-6
QUERY_BLOCK = 512
# 512 x 1024 float32 scores stay in a core's share of the cache; a GPU wants few large launches instead.
_CPU_BLOCK_BYTES = 2 << 20
_CUDA_BLOCK_BYTES = 256 << 20


@dataclass(frozen=True)
class RetrievalMetrics:
    """Retrieval quality over Q queries, each searched in all N images but itself.

    Args:
        recall: k -> share of queries with at least one image of the same building among the k nearest.
        mean_average_precision: mean over queries of `average_precision`.
        mean_reciprocal_rank: mean over queries of 1 / `first_rank`.
        first_rank: (Q,) int64, rank of the best right answer, 1 = nearest.
        average_precision: (Q,) float64, over the full ranking of the other N - 1 images.
    """

    recall: dict[int, float]
    mean_average_precision: float
    mean_reciprocal_rank: float
    first_rank: Tensor
    average_precision: Tensor


def select_queries(labels: Tensor, max_queries: int, per_building_limit: int, seed: int) -> Tensor:
    """Query rows: the first images of every building that has at least two, in a seeded order, up to a maximum.

    Args:
        labels: (N,) int64 building of each row.
        max_queries: at most this many queries.
        per_building_limit: at most this many queries a building, 0 = no cap.
        seed: of the order, and so of the choice when there are more than `max_queries`.

    Returns:
        (Q,) int64 rows on the device of `labels`; empty when no building has two images.
    """
    _, building, sizes = np.unique(labels.cpu().numpy(), return_inverse=True, return_counts=True)
    grouped = np.argsort(building, kind="stable")
    place = np.empty(len(building), dtype=np.int64)
    place[grouped] = np.arange(len(building)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    eligible = sizes[building] > 1
    if per_building_limit:
        eligible &= place < per_building_limit
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(eligible))[:max_queries]
    return torch.from_numpy(chosen.astype(np.int64)).to(labels.device)


def retrieval_metrics(
    vectors: Tensor,
    labels: Tensor,
    query_rows: Tensor,
    top_k: Sequence[int],
    *,
    block_bytes: int | None = None,
) -> RetrievalMetrics:
    """Search each query in all other rows by cosine and score the ranking of its building's images.

    Args:
        vectors: (N, D) unit rows, float32 or float16, on CPU or CUDA; arithmetic is float32 on that device.
        labels: (N,) int64 building of each row.
        query_rows: (Q,) int64 rows used as queries; the building of each has another image, see `select_queries`.
        top_k: the k of recall@k. A k of N - 1 or more is met by any ranking and says nothing.
        block_bytes: size of a tile of scores; default 2 MiB on CPU and 256 MiB on CUDA. Beyond `vectors` and results,
            memory is about twice this a thread.

    Raises:
        InputError: if there is no query, or a query's building has no other image.
    """
    queries = query_rows.to(vectors.device, torch.int64)
    labels = labels.to(vectors.device, torch.int64)
    groups = _Groups.of(labels)
    positives = groups.sizes[groups.of_row[queries]] - 1
    if not len(queries):
        raise InputError("retrieval metrics: no query; a query needs a building with at least two images")
    if int(positives.min()) < 1:
        row = int(queries[int(positives.argmin())])
        raise InputError(f"retrieval metrics: row {row} is the only image of its building, so it cannot be a query")
    if block_bytes is None:
        block_bytes = _CUDA_BLOCK_BYTES if vectors.is_cuda else _CPU_BLOCK_BYTES
    first_rank = torch.empty(len(queries), dtype=torch.int64, device=vectors.device)
    average_precision = torch.empty(len(queries), dtype=torch.float64, device=vectors.device)

    def score(block: Tensor) -> None:
        with torch.inference_mode():
            ranks, real = _ranks(vectors, groups, queries[block], block_bytes)
            first_rank[block] = ranks[:, 0]
            place = torch.arange(1, ranks.shape[1] + 1, device=ranks.device, dtype=torch.float64)
            precision = torch.where(real, place / ranks, 0.0)
            average_precision[block] = precision.sum(1) / real.sum(1)

    # Queries with equally many right answers share a block, so no block counts for answers that are not there.
    order = torch.argsort(positives, stable=True)
    threads = 1 if vectors.is_cuda else torch.get_num_threads()
    blocks = torch.split(order, min(QUERY_BLOCK, -(-len(order) // threads)))
    with full_float32():
        in_threads(score, blocks, threads)
    return RetrievalMetrics(
        recall={int(k): float((first_rank <= k).double().mean()) for k in top_k},
        mean_average_precision=float(average_precision.mean()),
        mean_reciprocal_rank=float((1.0 / first_rank.double()).mean()),
        first_rank=first_rank,
        average_precision=average_precision,
    )


@dataclass(frozen=True)
class _Groups:
    """Rows by building: rows of building g are `rows[starts[g] : starts[g] + sizes[g]]`."""

    of_row: Tensor
    rows: Tensor
    starts: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> _Groups:
        _, of_row, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
        return cls(of_row, torch.argsort(of_row, stable=True), sizes.cumsum(0) - sizes, sizes)

    def members(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) rows -> (B, P + 1) rows of the same building, and which of them are real rather than padding."""
        group = self.of_row[queries]
        slot = torch.arange(int(self.sizes[group].max()), device=queries.device)
        real = slot < self.sizes[group, None]
        place = torch.where(real, self.starts[group, None] + slot, self.starts[group, None])
        return self.rows[place], real


def _ranks(vectors: Tensor, groups: _Groups, queries: Tensor, block_bytes: int) -> tuple[Tensor, Tensor]:
    """(B, P) ranks of each query's right answers, ascending, and which are real; the rest is padding at the end."""
    query_vectors = vectors[queries].float()
    members, real = groups.members(queries)
    cosines = torch.stack(
        [(query_vectors * vectors[column].float()).sum(1) for column in members.unbind(1)], dim=1
    ).nan_to_num(nan=-2.0)
    cosines = cosines.masked_fill(~real | (members == queries[:, None]), -torch.inf)
    cosines = cosines.sort(dim=1, descending=True).values[:, :-1]  # the last is the query itself or padding
    answered = cosines.isfinite()
    thresholds = torch.where(answered, cosines - TIE, torch.inf)
    own_query, own_slot = real.nonzero(as_tuple=True)
    own_row = members[own_query, own_slot]
    wrong = torch.zeros_like(thresholds, dtype=torch.float64)
    step = max(1, block_bytes // (4 * len(queries)))
    below = torch.empty(len(queries), min(step, len(vectors)), device=vectors.device)
    for start in range(0, len(vectors), step):
        tile = query_vectors @ vectors[start : start + step].float().T
        width = tile.shape[1]
        inside = (own_row >= start) & (own_row < start + width)
        tile[own_query[inside], own_row[inside] - start] = -torch.inf
        for slot in range(thresholds.shape[1]):
            # Summing 0.0 and 1.0 is exact here and several times faster than counting booleans.
            wrong[:, slot] += width - torch.lt(tile, thresholds[:, slot, None], out=below[:, :width]).sum(1)
    return wrong.to(torch.int64) + torch.arange(1, thresholds.shape[1] + 1, device=vectors.device), answered
