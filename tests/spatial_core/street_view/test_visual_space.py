"""Principal components against scikit-learn's, on both sides of the size where its method changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.decomposition import PCA

from spatial_core.street_view import visual_space
from spatial_core.street_view.fingerprint_files import FingerprintSet
from spatial_core.street_view.visual_space import project


@dataclasses.dataclass(frozen=True)
class InMemory(FingerprintSet):
    """Fingerprints handed over in uneven batches."""

    pixels: npt.NDArray[np.uint8] = dataclasses.field(default_factory=lambda: np.empty((0, 0), np.uint8))

    def batches(self) -> Iterator[npt.NDArray[np.uint8]]:
        yield from np.array_split(self.pixels, sorted([1, 5, len(self.pixels) // 2]))


def smooth_images(count: int, side: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Sums of a few gradients and waves, whose spectrum decays as that of photographs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]
    total = np.zeros((count, side, side, 3))
    for frequency in range(8):
        phase = rng.uniform(0, 6.28, (count, 1, 1, 3))
        direction = rng.normal(0, 1, (count, 1, 1, 2))
        wave = np.sin(
            phase + frequency * (direction[..., :1] * x[None, ..., None] + direction[..., 1:] * y[None, ..., None])
        )
        total += rng.normal(0, 1, (count, 1, 1, 1)) * wave / (1 + frequency)
    return np.clip(127 + 60 * total, 0, 255).astype(np.uint8).reshape(count, -1)


def as_set(pixels: npt.NDArray[np.uint8]) -> InMemory:
    return InMemory((Path("x"),), len(pixels), pixels.shape[1], "", pixels)


def distances(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    wide = scores.astype(np.float64)
    return np.asarray(np.linalg.norm(wide[:200, None] - wide[None], axis=2))


@pytest.mark.parametrize(("count", "side"), [(60, 16), (300, 16), (479, 4), (480, 4), (3000, 4)])
def test_distances_are_those_of_scikit_learn(count: int, side: int) -> None:
    pixels = smooth_images(count, side)
    ours = project(as_set(pixels), 12, 42)
    model = PCA(12, random_state=42)
    expected = distances(model.fit_transform(pixels.astype(np.float32) / np.float32(255)))
    assert ours.scores.dtype == np.float32
    assert np.abs(distances(ours.scores) - expected).max() < 2e-4 * expected.max()
    assert ours.explained == pytest.approx(float(model.explained_variance_ratio_.sum()), abs=1e-4)


def test_streamed_components_are_exact_whatever_the_batches() -> None:
    pixels = smooth_images(3000, 4)
    model = PCA(12, svd_solver="full").fit(pixels / 255)
    streamed = project(as_set(pixels), 12, 0)
    assert distances(streamed.scores) == pytest.approx(distances(model.transform(pixels / 255)), abs=3e-6)
    once = dataclasses.replace(as_set(pixels), pixels=pixels)
    object.__setattr__(once, "batches", lambda: iter([pixels]))
    assert np.array_equal(project(once, 12, 0).scores, streamed.scores)


@pytest.mark.parametrize("count", [1, 2, 500])
def test_equal_images_are_all_one_point(count: int) -> None:
    space = project(as_set(np.full((count, 48), 7, np.uint8)), 12, 0)
    assert space.scores.shape == (count, min(12, count))
    assert np.abs(space.scores).max() < 1e-5
    assert space.blank == 0


def test_components_are_at_most_what_there_is() -> None:
    assert project(as_set(smooth_images(5, 4)), 32, 0).scores.shape == (5, 5)
    assert project(as_set(smooth_images(300, 1)), 32, 0).scores.shape == (300, 3)


@pytest.mark.parametrize("count", [40, 600])
def test_blank_images_are_counted(count: int) -> None:
    pixels = smooth_images(count, 4)
    pixels[[3, 17]] = 0
    assert project(as_set(pixels), 8, 0).blank == 2
    assert visual_space._SMALL * 48 == 480  # both methods were used
