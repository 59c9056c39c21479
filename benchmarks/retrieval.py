"""Retrieval metrics of one split: counting in cache-sized tiles beside one matmul and top-k a query.

The reference is the earlier pipeline's validation: for each query one product with all images on the CPU, the 1000
nearest by top-k, and a look for the building among them. It gives recall@k only; ours adds the full ranking's mAP and
MRR in the same time. Both must find the same recall.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.harness import Prepared, Row, compare, main
from spatial_core.retrieval.metrics import retrieval_metrics, select_queries

IMAGES, DIM, VIEWS = 100_000, 256, 4
QUERIES, PER_BUILDING = 4096, 4
REFERENCE_QUERIES = 256
TOP_K = (1, 5, 10, 100, 1000)
# Twice as much noise as building: recall@1 is near a third, so that ranks are neither all 1 nor all chance.
NOISE = 2.0

Data = tuple[Tensor, Tensor, Tensor]


def data(images: int, queries: int) -> Data:
    """(images, 256) unit vectors of buildings seen four times each, their labels, and the query rows."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) // VIEWS
    centres = torch.randn(images // VIEWS + 1, DIM, generator=generator)
    vectors = normalize(centres[labels] + NOISE * torch.randn(images, DIM, generator=generator))
    return vectors, labels, select_queries(labels, QUERIES, PER_BUILDING, seed=0)[:queries]


def ours(prepared: Data) -> dict[str, Any]:
    """Recall, mAP and MRR over the full ranking."""
    vectors, labels, queries = prepared
    found = retrieval_metrics(vectors, labels, queries, TOP_K)
    return {"first_ranks": found.first_rank.tolist(), "mAP": found.mean_average_precision}


def reference(prepared: Data) -> dict[str, Any]:
    """Recall by one product and one top-k a query."""
    vectors, labels, queries = prepared
    first_ranks = []
    for query in queries.tolist():
        cosines = vectors @ vectors[query]
        cosines[query] = -torch.inf
        nearest = cosines.topk(max(TOP_K)).indices
        hits = (labels[nearest] == labels[query]).nonzero()
        first_ranks.append(int(hits[0]) + 1 if len(hits) else max(TOP_K) + 1)
    return {"first_ranks": first_ranks}


def rows(scale: float = 1.0) -> list[Row]:
    """One row: queries a second of both."""
    images = max(4 * max(TOP_K), int(IMAGES * scale))
    queries, few = min(QUERIES, images), min(REFERENCE_QUERIES, images)
    row = compare(
        "retrieval metrics",
        "queries",
        Prepared(partial(data, images, queries), ours),
        Prepared(partial(data, images, few), reference),
        queries,
        target=10.0,
        reference_items=few,
    )
    found = [[rank <= k for rank in row.ours.figures["first_ranks"][:few]] for k in TOP_K]
    expected = [[rank <= k for rank in row.reference.figures["first_ranks"]] for k in TOP_K]
    if found != expected:
        raise RuntimeError("ours and the reference answer the same queries differently")
    figures = {f"recall@{k}": sum(hits) / few for k, hits in zip(TOP_K, found, strict=True)}
    figures["mAP"] = row.ours.figures["mAP"]
    return [replace(row, ours=replace(row.ours, figures=figures), reference=replace(row.reference, figures={}))]


if __name__ == "__main__":
    main(rows)
