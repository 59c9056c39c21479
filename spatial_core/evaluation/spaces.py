"""The vector spaces that are compared: the projector's, the raw backbone's, its principal components, and noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_core.errors import ModelError
from spatial_core.evaluation.split_data import SplitData, feature_batches, row_count
from spatial_core.metric_learning.projector import Projector, project

PROJECTOR, BACKBONE, PCA, RANDOM = "projector", "backbone", "pca", "random"
METHODS = (PROJECTOR, BACKBONE, PCA, RANDOM)
# Components settle long before this; more rows would only cost D^2 each.
_PCA_ROWS = 200_000
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class PcaModel:
    """Principal components of training features.

    Args:
        mean: (D,) float32.
        components: (D, K) float32, orthonormal columns, largest variance first.
        rows: training images they were fitted on.
        explained: share of the variance that the components keep.
    """

    mean: Tensor
    components: Tensor
    rows: int
    explained: float


def fit_pca(train: Path, dimensions: int) -> PcaModel:
    """Fit on the training split only, from a covariance summed batch by batch: D x D float64, whatever the rows.

    Of more than 200 000 images an evenly spaced choice is used.
    """
    stride = -(-max(1, row_count(train)) // _PCA_ROWS)
    seen = used = 0
    total: npt.NDArray[np.float64] | None = None
    products: npt.NDArray[np.float64] | None = None
    shift: npt.NDArray[np.float32] | None = None
    for batch in feature_batches(train):
        block = batch[(-seen) % stride :: stride].astype(np.float32)
        seen += len(batch)
        if not len(block):
            continue
        if shift is None or total is None or products is None:
            # Sums around any point near the mean keep the digits that sums around zero would lose.
            shift = block.mean(axis=0)
            total, products = np.zeros(block.shape[1]), np.zeros((block.shape[1], block.shape[1]))
        centred = block - shift
        total += centred.sum(axis=0, dtype=np.float64)
        products += centred.T @ centred
        used += len(block)
    if shift is None or total is None or products is None:
        raise ModelError(f"{train}: no training images to fit principal components on")
    covariance = products / used - np.outer(total, total) / used**2
    variances, vectors = np.linalg.eigh(covariance)
    keep = min(dimensions, len(variances))
    largest = np.clip(variances[::-1], 0, None)
    everything = float(largest.sum())
    return PcaModel(
        mean=torch.from_numpy((shift + total / used).astype(np.float32)),
        components=torch.from_numpy(np.ascontiguousarray(vectors[:, ::-1][:, :keep], dtype=np.float32)),
        rows=used,
        explained=float(largest[:keep].sum()) / everything if everything else 1.0,
    )


def build_spaces(
    split: SplitData, projector: Projector, pca: PcaModel | None, device: torch.device, seed: int
) -> dict[str, Tensor]:
    """(N, dim) unit rows of every method, by name; without a PCA model that space is left out.

    `split.features` becomes the backbone's space: it is normalised in place, so that it need not be held twice.

    Raises:
        ModelError: if the projector or the components were made from features of another width.
    """
    width = split.features.shape[1]
    if width != projector.config.input_dim:
        raise ModelError(
            f"{split.name} split: features have {width} dimensions, the projector takes {projector.config.input_dim}; "
            f"it was trained on another backbone"
        )
    if pca is not None and len(pca.mean) != width:
        raise ModelError(f"{split.name} split: features have {width} dimensions, those of train have {len(pca.mean)}")
    spaces = {PROJECTOR: project(projector.to(device), split.features).cpu()}
    if pca is not None:
        mean, components = pca.mean.to(device), pca.components.to(device)
        spaces[PCA] = torch.empty(len(split), components.shape[1])
        for rows in _blocks(split.features):
            reduced = (split.features[rows].to(device).float() - mean) @ components
            spaces[PCA][rows] = F.normalize(reduced).cpu()
    generator = torch.Generator().manual_seed(seed)
    spaces[RANDOM] = F.normalize(torch.randn(len(split), projector.config.output_dim, generator=generator))
    for rows in _blocks(split.features):
        split.features[rows] = F.normalize(split.features[rows].float()).to(split.features.dtype)
    spaces[BACKBONE] = split.features
    return {name: spaces[name] for name in METHODS if name in spaces}


def _blocks(matrix: Tensor) -> list[slice]:
    step = max(1, _BLOCK_BYTES // (4 * max(1, matrix.shape[1])))
    return [slice(start, start + step) for start in range(0, len(matrix), step)]
