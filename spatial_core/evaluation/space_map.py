"""A flat map of a space: which images lie near which. Made to look at, not to measure on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spatial_core.evaluation.pairs import BuildingIndex

_FEWEST_IMAGES = 8
_PERPLEXITY = 12.0  # buildings have 2 to 7 images: neighbourhoods of this size show both them and what lies beside
_PCA_DIMENSIONS = 50
_COLLAPSED = 1e-6
_ITERATIONS = 600


@dataclass(frozen=True)
class SpaceMap:
    """Positions of the same images in several spaces.

    Args:
        rows: (P,) image rows of the split.
        labels: (P,) building number of each.
        positions: method -> (P, 2), each axis within 0 to 1.
        images: images of the split, of which P were chosen.
    """

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    positions: dict[str, npt.NDArray[np.float64]]
    images: int


def choose_images(labels: Tensor, limit: int, seed: int) -> npt.NDArray[np.int64]:
    """Rows of whole buildings with at least two images, in a seeded order, until `limit` images are reached."""
    index = BuildingIndex.of(labels)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(index.sizes > 1))
    fitting = order[np.cumsum(index.sizes[order]) <= limit]
    return np.sort(index.expand(fitting)[1])


def map_spaces(spaces: dict[str, Tensor], labels: Tensor, limit: int, seed: int) -> SpaceMap | None:
    """t-SNE of each space on the same images, or None where there are too few for a map to say anything."""
    rows = choose_images(labels, limit, seed)
    if len(rows) < _FEWEST_IMAGES:
        return None
    positions = {
        method: _flatten(vectors[torch.from_numpy(rows)].float().numpy(), seed) for method, vectors in spaces.items()
    }
    return SpaceMap(rows, labels.numpy()[rows], positions, len(labels))


def _flatten(vectors: npt.NDArray[np.float32], seed: int) -> npt.NDArray[np.float64]:
    from sklearn.manifold import TSNE
    from sklearn.utils.extmath import randomized_svd
    from threadpoolctl import threadpool_limits

    # Vectors that are not finite go to the origin: a report on a broken head must not break itself.
    vectors = np.nan_to_num(vectors, nan=0.0, posinf=0.0, neginf=0.0)
    keep = min(_PCA_DIMENSIONS, *vectors.shape)
    left, sizes, _ = randomized_svd(vectors - vectors.mean(axis=0), keep, random_state=seed)
    reduced = left * sizes
    spread = float(reduced[:, 0].std())
    if spread < _COLLAPSED:
        # scikit-learn's tree crashes the process on points that all coincide.
        return np.full((len(vectors), 2), 0.5)
    start = np.zeros((len(vectors), 2), dtype=np.float32)
    start[:, : min(2, reduced.shape[1])] = reduced[:, :2] / spread * 1e-4
    layout = TSNE(
        perplexity=min(_PERPLEXITY, (len(vectors) - 1) / 3),
        init=start,
        learning_rate="auto",
        max_iter=_ITERATIONS,
        random_state=seed,
    )
    # Its threads meet after each of many short steps: on a shared machine one thread was 4 to 5 times faster than two.
    with threadpool_limits(1):
        flat = layout.fit_transform(reduced)
    low, high = flat.min(axis=0), flat.max(axis=0)
    placed: npt.NDArray[np.float64] = ((flat - low) / np.maximum(high - low, 1e-9)).astype(np.float64)
    return placed
