"""Images by building, and cosines of chosen pairs of images: what the breakdowns share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Rows = npt.NDArray[np.int64]
_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class BuildingIndex:
    """Images of building b are `rows[starts[b] : starts[b] + sizes[b]]`."""

    rows: Rows
    starts: Rows
    sizes: Rows

    @classmethod
    def of(cls, labels: Tensor) -> BuildingIndex:
        """Index (N,) labels 0 .. B - 1."""
        numbers = labels.numpy()
        sizes = np.bincount(numbers).astype(np.int64)
        return cls(np.argsort(numbers, kind="stable"), np.cumsum(sizes) - sizes, sizes)

    def expand(self, buildings: Rows) -> tuple[Rows, Rows]:
        """(M,) buildings -> for each of their images, position in `buildings` and image row."""
        sizes = self.sizes[buildings]
        owner = np.repeat(np.arange(len(buildings)), sizes)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return owner, self.rows[self.starts[buildings][owner] + within]


def positive_pairs(labels: Tensor, queries: Tensor) -> tuple[Rows, Rows]:
    """(Q,) query rows -> position of the query and row of each other image of its building."""
    rows = queries.numpy()
    owner, image = BuildingIndex.of(labels).expand(labels.numpy()[rows])
    other = image != rows[owner]
    return owner[other], image[other]


def pair_cosines(vectors: Tensor, left: Rows, right: Rows) -> npt.NDArray[np.float32]:
    """Cosine of `vectors[left[i]]` and `vectors[right[i]]`, unit rows, in blocks of bounded memory."""
    cosines = np.empty(len(left), dtype=np.float32)
    step = max(1, _BLOCK_BYTES // (8 * max(1, vectors.shape[1])))
    for start in range(0, len(left), step):
        block = slice(start, start + step)
        first, second = vectors[torch.from_numpy(left[block])], vectors[torch.from_numpy(right[block])]
        cosines[block] = (first.float() * second.float()).sum(1).numpy()
    return cosines
