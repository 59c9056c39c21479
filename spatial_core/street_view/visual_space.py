"""Fingerprints -> a few principal components, the space in which visual difficulty is measured.

Follows scikit-learn's `PCA(components, random_state=seed)`, whose method depends on the size of the data. With fewer
images than ten times the values of a fingerprint it draws a random subspace, so that very function is called, on at
most 23 MB of fingerprints of 768 values. From there on it takes the eigenvectors of the covariance matrix; the same is
done here without ever holding the fingerprints, from sums of products that are whole numbers and therefore exact in
float64: 5.8 M images need no more memory than ten thousand, and threads and batches change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spatial_core.street_view.fingerprint_files import FingerprintSet

Pixels = npt.NDArray[np.uint8]
_SMALL = 10  # images a value; scikit-learn's own limit
_LEVELS = 255.0


@dataclass(frozen=True)
class VisualSpace:
    """Images in principal components.

    Args:
        scores: (N, C) float32, coordinates of each image; 742 MB for 5.8 M images of 32 components.
        explained: share of the fingerprints' variance that lies in them.
        blank: images whose fingerprint is all zero, as the earlier pipeline stored for images it could not read.
    """

    scores: npt.NDArray[np.float32]
    explained: float
    blank: int


def project(fingerprints: FingerprintSet, components: int, seed: int) -> VisualSpace:
    """Principal components of all fingerprints of a folder; as many as asked for, or as there are.

    Raises:
        ArtifactError: if a fingerprint is malformed.
    """
    components = min(components, fingerprints.rows, fingerprints.dim)
    if fingerprints.rows < _SMALL * fingerprints.dim:
        return _project_small(np.concatenate(list(fingerprints.batches())), components, seed)
    mean, axes, explained = _covariance_axes(fingerprints.batches(), fingerprints.dim, components)
    scores = np.empty((fingerprints.rows, components), np.float32)
    row = blank = 0
    for pixels in fingerprints.batches():
        scores[row : row + len(pixels)] = (pixels - mean) @ axes / _LEVELS
        row += len(pixels)
        blank += _count_blank(pixels)
    return VisualSpace(scores, explained, blank)


def _project_small(pixels: Pixels, components: int, seed: int) -> VisualSpace:
    from sklearn.decomposition import PCA

    values = pixels.astype(np.float32) / np.float32(_LEVELS)
    if not np.ptp(values, axis=0).any():  # one image, or all alike: there is no variance to explain
        return VisualSpace(np.zeros((len(pixels), components), np.float32), 1.0, _count_blank(pixels))
    model = PCA(n_components=components, random_state=seed)
    scores = np.ascontiguousarray(model.fit_transform(values), dtype=np.float32)
    return VisualSpace(scores, float(model.explained_variance_ratio_.sum()), _count_blank(pixels))


def _covariance_axes(
    batches: Iterable[Pixels], dim: int, components: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
    """Mean (D,) and leading eigenvectors (D, C) of the pixels' covariance, and their share of the variance."""
    count, total, products = 0, np.zeros(dim), np.zeros((dim, dim))
    for pixels in batches:
        values = pixels.astype(np.float64)
        total += values.sum(axis=0)
        products += values.T @ values
        count += len(values)
    mean = total / count
    covariance = (products - count * np.outer(mean, mean)) / max(1, count - 1)
    variances, axes = np.linalg.eigh(covariance)
    whole = float(np.maximum(variances, 0).sum())
    explained = float(np.maximum(variances[-components:], 0).sum()) / whole if whole else 1.0
    return mean, axes[:, : -components - 1 : -1], explained


def _count_blank(pixels: Pixels) -> int:
    return int(np.count_nonzero(~pixels.any(axis=1)))
